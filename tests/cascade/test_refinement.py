"""The interface of refinement methods, and LuVe's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from luve_lightning.analysis.planner import Planner
from luve_lightning.cascade import CascadeOptions, LuVePipeline, refinement
from luve_lightning.cascade.refinement import Refinement, RefiningSteps, refinement_method, refinement_methods
from luve_lightning.cascade.run import LuVePipelineOutput, RefinementRun
from luve_lightning.cascade.stages import refine
from luve_lightning.functional.noise_bands import noised
from tests.analysis.test_plan import small
from tests.helpers.noise import noise


@dataclass(frozen=True)
class Scaling(Refinement):
    """Scales latents by the first stage's mean."""

    factor: float = 2.0
    rounds: int = 1
    way: Literal["up", "down"] = "up"
    note: str | None = None

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ValueError(f"factor: expected a number > 0, got {self.factor}")

    def refined(self, given: RefinementRun) -> Tensor:
        return given.latents * self.factor + (0 if given.motion is None else given.motion.mean())

    def steps(self, steps: int, skip: int) -> int:
        return self.rounds

    def planned(self, motion: Any, size: Any, steps: int, skip: int) -> list[RefiningSteps]:
        return [RefiningSteps(motion, steps, skip, 3), RefiningSteps(size, steps, steps - self.rounds)]

    def check(self, pipeline: Any, options: CascadeOptions) -> None:
        if options.width > 1000:
            raise ValueError(f"scaling: expected a width up to 1000, got {options.width}")


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**refinement_methods(), "scaling": Scaling}
    monkeypatch.setattr(refinement, "refinement_methods", lambda: known)


@pytest.mark.usefixtures("scaling")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lanczos", None, r"refinement: expected one of .*luve.*, got 'lanczos'"),
        ("luve", {"factor": 1}, "refinement_options: luve has no 'factor': known are none"),
        ("scaling", {"facto": 1}, "refinement_options: scaling has no 'facto': known are factor, rounds, way, note"),
        ("scaling", {"factor": "2"}, "refinement_options.factor: expected a number, got '2'"),
        ("scaling", {"rounds": 1.5}, "refinement_options.rounds: expected a whole number, got 1.5"),
        ("scaling", {"rounds": True}, "refinement_options.rounds: expected a whole number, got True"),
        ("scaling", {"way": "left"}, "refinement_options.way: expected one of up, down, got 'left'"),
        ("scaling", {"note": 3}, "refinement_options.note: expected a text or null, got 3"),
        ("scaling", {"factor": -1}, "refinement_options: factor: expected a number > 0, got -1"),
    ],
)
def test_what_no_method_takes_is_refused(name: str, options: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        CascadeOptions(64, 96, refinement=name, refinement_options=options)


@pytest.mark.usefixtures("scaling")
def test_options_reach_the_method_and_the_recipe() -> None:
    assert refinement_method("scaling", {"factor": 3, "note": "x"}) == Scaling(3, note="x")
    default = CascadeOptions(64, 96)
    assert replace(default, refinement="luve", refinement_options={}).recipe() == default.recipe()
    assert "refinement" not in default.recipe()
    rival = replace(default, refinement="scaling", refinement_options={"rounds": 2})
    own = {"refinement": "scaling", "refinement_options": {"factor": 2.0, "rounds": 2, "way": "up", "note": None}}
    assert rival.recipe() == default.recipe() | own
    with pytest.raises(ValueError, match=r"^refinement scaling: cascade is false"):
        replace(rival, cascade=False)


@pytest.mark.usefixtures("scaling")
def test_the_pipeline_runs_the_method_on_its_stages(tiny_cascade: Path) -> None:
    pipeline = LuVePipeline.from_pretrained(tiny_cascade / "wan", tiny_cascade / "vluer")
    pipeline.set_progress_bar_config(disable=True)
    told: list[tuple[str, int]] = []
    options = CascadeOptions(64, 96, 5, 32, 48, steps=2, skip_steps=1, refinement="scaling", upsampling="latent")
    output = pipeline(
        "a red boat", options, refinement_options={"rounds": 7}, output_type="latent", keep_stages=True,
        generator=torch.Generator().manual_seed(0), guidance=1.0,
        callback_on_stage_start=lambda stage, steps: told.append((stage, steps)),
    )  # fmt: skip
    assert isinstance(output, LuVePipelineOutput)
    assert output.stages is not None
    assert told == [("motion", 2), ("upsampled", 0), ("refined", 7)]
    want = output.stages["upsampled"] * 2 + output.stages["motion"].mean()
    assert torch.equal(output.stages["refined"], want)
    with pytest.raises(ValueError, match=r"^scaling: expected a width up to 1000, got 1008$"):
        pipeline("a red boat", options, width=1008)
    # Alone, by name or as an object, with and without the first stage's latents.
    latents = noise(1, 16, 2, 8, 12)
    assert torch.equal(refine(pipeline, latents, "x", refinement="scaling"), latents * 2)
    own = refine(pipeline, latents, "x", refinement=Scaling(5.0), motion=latents)
    assert torch.equal(own, latents * 5 + latents.mean())
    with pytest.raises(ValueError, match=r"^scaling: expected a width up to 1000, got 1024$"):
        refine(pipeline, noise(1, 16, 1, 2, 128), "x", refinement="scaling")


def test_luve_noises_and_denoises(tiny_cascade: Path) -> None:
    """Latents at the level after the skipped steps, of the generator's noise, and denoised to the end."""
    pipeline = LuVePipeline.from_pretrained(tiny_cascade / "wan", tiny_cascade / "vluer")
    pipeline.set_progress_bar_config(disable=True)
    latents, seen = noise(2, 16, 2, 4, 6), []
    pipeline.transformer.patch_embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    generator = torch.Generator().manual_seed(3)
    refine(pipeline, latents, ["a", "b"], skip_steps=2, steps=4, guidance=1.0, generator=generator)
    fresh = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    scheduler = pipeline.schedule().scheduler
    scheduler.set_timesteps(4)
    assert len(seen) == 2
    assert torch.equal(seen[0], noised(latents, fresh, scheduler.sigmas[2]))
    assert torch.equal(refine(pipeline, latents, ["a", "b"], skip_steps=4, steps=4), latents)


@pytest.mark.usefixtures("scaling")
def test_a_plan_counts_passes_of_other_sizes() -> None:
    parts, options = small(), CascadeOptions(64, 96, 5, 32, 48, steps=10, skip_steps=4)
    [luve] = [stage for stage in Planner(parts, options).stages() if stage.stage == "refine"]
    rival = replace(options, refinement="scaling", refinement_options={"rounds": 3})
    [plan] = [stage for stage in Planner(parts, rival).stages() if stage.stage == "refine"]
    low = replace(options, height=32, width=48, upsampling="latent")
    [small_one] = [stage for stage in Planner(parts, low).stages() if stage.stage == "refine"]
    assert (plan.steps, plan.latents, plan.tokens) == (6 + 3, luve.latents, luve.tokens)
    assert plan.forwards == 2 * (3 * 6 + 3)
    each = luve.flops // luve.forwards
    assert plan.flops == 3 * small_one.flops + 6 * each
    assert plan.peak == luve.peak
