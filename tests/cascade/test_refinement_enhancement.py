"""The refinements of cascades that only enhance: where they start, where a true field leads them, what they refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luve_lightning.cascade import LuVePipeline
from luve_lightning.cascade.options import CascadeOptions, Guidance
from luve_lightning.cascade.refinement import refinement_method
from luve_lightning.cascade.run import ExpertUse
from luve_lightning.cascade.stages import refine
from luve_lightning.models.backbones import Denoiser
from tests.helpers.tiny_luve import noise

METHODS = ("flashvideo", "lavie", "waver")


def load(folder: Path, rival: str | None, dtype: torch.dtype = torch.float32) -> LuVePipeline:
    refiner = None if rival is None else folder / "rivals" / rival
    pipeline = LuVePipeline.from_pretrained(folder / "wan", folder / "vluer", refiner=refiner, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline, LuVePipeline)
    return pipeline


def mixed(name: str, latents: Tensor, draw: Tensor, s: float) -> Tensor:
    """The published formulas, written out."""
    return (1 - s) * latents + s * draw if name == "waver" else (1 - s * s) ** 0.5 * latents + s * draw


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "steps", "own"), [("flashvideo", 4, 0.9645), ("lavie", 6, 0.1), ("waver", 20, 0.9)])
def test_a_true_field_leads_from_the_published_start_to_the_clean_latents(
    tiny_cascade: Path, monkeypatch: pytest.MonkeyPatch, name: str, steps: int, own: float, batch: int
) -> None:
    """A straight one is followed exactly, however few steps are taken."""
    pipeline, latents, clean = load(tiny_cascade, name), noise(batch, 16, 2, 4, 6), noise(batch, 16, 2, 4, 6, seed=1)
    inputs: list[Tensor] = []
    told: list[float] = []
    conditions: list[Tensor | None] = []

    def field(self: Denoiser, x: Tensor, timestep: Tensor, text: Tensor, **options: Any) -> Tensor:
        inputs.append(x)
        told.append(timestep[0].item())
        conditions.append(options.get("condition"))
        return inputs[0] - clean

    monkeypatch.setattr(Denoiser, "velocity", field)
    record: list[ExpertUse] = []
    found = refine(
        pipeline, latents, ["x"] * batch, refinement=name, steps=6, skip_steps=4, guidance=1.0, record=record,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    torch.testing.assert_close(found, clean, rtol=1e-4, atol=1e-4)
    draw = torch.Generator().manual_seed(3)
    first, second = (torch.randn(latents.shape, generator=draw) for _ in range(2))
    if name == "lavie":
        assert torch.equal(inputs[0], first), "pure noise"
        assert all(torch.equal(one, conditions[0]) for one in conditions if one is not None)  # type: ignore[arg-type]
        torch.testing.assert_close(conditions[-1], mixed(name, latents, second, own))
    else:
        torch.testing.assert_close(inputs[0], mixed(name, latents, first, own))
        assert set(conditions) == {None}
        assert told[0] == 1000
    assert len(record) == len(inputs) == steps
    assert refinement_method(name).steps(6, 4) == steps
    (planned,) = refinement_method(name).planned((2, 2, 3), (2, 4, 6), 6, 4)
    assert (planned.grid, planned.steps, planned.skip) == ((2, 4, 6), steps, 0)


def test_the_levels_of_flashvideo_are_shifted(tiny_cascade: Path) -> None:
    """As its code spaces four: 1 - t' with t' = 1 - 2.5 (1 - t) / (1 + 1.5 (1 - t))."""
    record: list[ExpertUse] = []
    refine(load(tiny_cascade, "flashvideo"), noise(1, 16, 1, 2, 2), "x", refinement="flashvideo", record=record)
    want = [2.5 * s / (1 + 1.5 * s) for s in (1.0, 0.75, 0.5, 0.25)]
    assert [use.sigma for use in record] == pytest.approx(want)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_condition_is_heeded_in_every_prediction(tiny_cascade: Path, batch: int, dtype: torch.dtype) -> None:
    """Guided, both at once or one by one; the first stage's latents matter, not only noise and prompt."""
    pipeline, found = load(tiny_cascade, "lavie", dtype), {}
    low = {"some": noise(batch, 16, 2, 4, 6), "others": noise(batch, 16, 2, 4, 6, seed=9)}
    for name, latents in low.items():
        for batched in (False, True):
            found[name, batched] = refine(
                pipeline, latents, ["x"] * batch, refinement="lavie", steps=2, skip_steps=0,
                guidance=Guidance(3.0, batched=batched), generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
        torch.testing.assert_close(*(found[name, batched] for batched in (False, True)), rtol=0.1, atol=0.1)
        assert found[name, False].dtype == torch.float32
    assert not torch.allclose(found["some", False], found["others", False], atol=0.1)


def test_a_refiner_of_another_training_is_refused(tiny_cascade: Path) -> None:
    options = CascadeOptions(64, 96, 5, 32, 48, steps=2, skip_steps=1)
    plain = load(tiny_cascade, None)
    for name in METHODS:
        trained = load(tiny_cascade, name)
        with pytest.raises(ValueError, match=f"was trained for none; expected one for {name}, as experiments/rivals/"):
            plain("x", replace(options, refinement=name))
        with pytest.raises(ValueError, match=f"was trained for the refinement {name}; expected one for luve"):
            trained("x", options)
        with pytest.raises(ValueError, match=f"was trained for the refinement {name}; expected one for luve"):
            trained("x", replace(options, cascade=False), with_refiner=True)
    with pytest.raises(ValueError, match=r"trained for the refinement waver; expected one for lavie, as .*lavie\.yaml"):
        refine(trained, noise(1, 16, 1, 2, 2), "x", refinement="lavie")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flashvideo", {"evaluations": 0}, "evaluations: expected at least 1, got 0"),
        ("flashvideo", {"strength": 1.5}, r"strength: expected a number in \[0, 1\], got 1.5"),
        ("flashvideo", {"shift": 0}, "shift: expected a number greater than 0, got 0"),
        ("waver", {"evaluations": 2.5}, r"evaluations: expected a whole number, got 2\.5"),
        ("waver", {"strength": -1}, r"strength: expected a number in \[0, 1\], got -1"),
        ("lavie", {"strength": "much"}, "strength: expected a number, got 'much'"),
        ("lavie", {"evaluations": 4}, "lavie has no 'evaluations': known are strength"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CascadeOptions(64, 96, refinement=name, refinement_options=options)
