"""The plan of a training step, against what was measured and against a real step."""

from __future__ import annotations

from dataclasses import asdict, replace
from math import prod
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from luve_lightning.analysis.cost import REFERENCE, gpu_speed
from luve_lightning.analysis.dry_run import BLOCK
from luve_lightning.analysis.model_parts import PartConfigs, Parts, wan_1_3b
from luve_lightning.analysis.plan import recipe_text
from luve_lightning.analysis.recipe_plan import RecipePlan
from luve_lightning.analysis.training_plan import TrainingStep, plan_step
from luve_lightning.functional.frequency import FrequencyFilter
from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.models.backbones import Denoiser, denoiser_of
from luve_lightning.models.experts import ExpertConfig, add_expert

GIB = 2**30
TINY = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 8,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 2,
}  # fmt: skip
LFE = ExpertConfig("attention", 32, 32, FrequencyFilter("low", 0.5), SigmaBand(0.875, 1.0))


def expert(dtype: torch.dtype = torch.bfloat16) -> Denoiser:
    denoiser = denoiser_of(Parts(wan_1_3b(), dtype).transformer)
    denoiser.module.train()
    add_expert(denoiser.module, "lfe", LFE, dtype=torch.float32)
    return denoiser


def adapted(configs: PartConfigs) -> Denoiser:
    denoiser = denoiser_of(Parts(configs, torch.float32).transformer)
    denoiser.module.train().requires_grad_(True)
    return denoiser


@pytest.mark.slow
@pytest.mark.parametrize(("task", "gib", "seconds"), [("lfe", 54.5, 46.0), ("adaptation", 77.7, 49.4)])
def test_a_step_at_2k_takes_what_was_measured(task: str, gib: float, seconds: float) -> None:
    """docs/performance.md, `luve bench --subject experts-train --repeats 1`, at a revision with PyTorch's own norms."""
    denoiser = expert() if task == "lfe" else adapted(wan_1_3b())
    for module in denoiser.module.modules():
        if isinstance(module, nn.RMSNorm):
            module.__class__ = nn.RMSNorm
    denoiser.set_recompute("all_but_attention")
    step = plan_step(denoiser, "2k", (13, 184, 320), 1, 512, torch.bfloat16, gpu_speed("h200", None))
    assert step.tokens == 191_360
    assert step.peak / GIB == pytest.approx(gib, rel=0.01)
    assert step.seconds == pytest.approx(seconds, rel=0.06)
    assert all(parameter.grad is None for parameter in denoiser.module.parameters())


def test_what_is_not_kept_is_not_counted() -> None:
    def steps(blocks: int) -> dict[str, TrainingStep]:
        denoiser, found = adapted(tiny(num_layers=blocks)), {}
        for name, options in {"nothing": {}, "all_but_attention": {}, "blocks": {}, "host": {"offload": True}}.items():
            denoiser.set_recompute("blocks" if name == "host" else name, **options)  # type: ignore[arg-type]
            found[name] = plan_step(denoiser, name, (3, 64, 64), 1, 64, torch.bfloat16)
        return found

    four, eight = steps(4), steps(8)
    peaks = [step.peak for step in eight.values()]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4
    flops = [step.flops for step in eight.values()]
    assert flops[0] < flops[1] < flops[2] == flops[3]
    # Four more blocks: their inputs in bfloat16 where those are kept on the GPU, else their gradients alone.
    more = {name: step.passes - four[name].passes for name, step in eight.items()}
    assert more["blocks"] == pytest.approx(4 * 3072 * 32 * 2, rel=0.02)
    new = [p for _, block in adapted(tiny(num_layers=4)).blocks for p in block.parameters()]
    assert more["host"] == sum(-(-p.numel() * 4 // BLOCK) * BLOCK for p in new)


def tiny(**changes: int) -> PartConfigs:
    return PartConfigs(transformer=TINY | changes, vae={}, text_encoder={}, vluer={})


@pytest.mark.parametrize("batch", [1, 3])
def test_operations_are_those_of_a_real_step(batch: int) -> None:
    """PyTorch's own counter of a real step, whose attention keeps its products; a GPU's computes one of them again."""
    step = plan_step(adapted(tiny()), "tiny", (3, 8, 6), batch, 5)
    real = denoiser_of(Parts(tiny(), torch.float32, "cpu").transformer)
    real.module.train().requires_grad_(True)
    latents = torch.randn(batch, real.channels, 3, 8, 6)
    text = torch.randn(batch, 5, real.text_dim)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        real.velocity(latents, torch.full((batch,), 500.0), text).square().mean().backward()
    tokens = prod(real.token_grid((3, 8, 6)))
    assert step.tokens == tokens
    again = TINY["num_layers"] * batch * 2 * 32 * tokens * (tokens + 5)
    assert step.flops == counter.get_total_flops() + again


def test_a_larger_batch_takes_as_much_more_and_the_optimiser_needs_room() -> None:
    one, two, four = (plan_step(adapted(tiny()), "tiny", (3, 16, 16), batch, 5) for batch in (1, 2, 4))
    assert (four.passes - two.passes) == pytest.approx(2 * (two.passes - one.passes), rel=0.05)
    small = plan_step(adapted(tiny()), "tiny", (1, 2, 2), 1, 1)
    trained = sum(p.numel() for p in adapted(tiny()).module.parameters())
    assert small.optimizer == 8 * trained
    assert small.peak >= small.weights + small.optimizer + 8 * trained


def test_the_text_names_the_largest_bucket_and_whether_it_fits() -> None:
    def step(name: str, peak: int, seconds: float | None) -> TrainingStep:
        values: dict[str, Any] = {"latents": (3, 4, 4), "tokens": 12_345, "batch": 2, "flops": 10**13}
        held = {"weights": GIB, "optimizer": 0, "shared": 0}
        return TrainingStep(name, passes=peak - GIB, peak=peak, terms={}, seconds=seconds, **held, **values)

    rows = tuple(asdict(one) for one in (step("a", 30 * GIB, 2.0), step("b", 200 * GIB, None)))
    plan = RecipePlan("training", "step", None, 0.0, 200 * GIB, 3000, rows=rows)
    lines = recipe_text(plan, gpu_speed("h200", None)).splitlines()
    assert lines[0].split() == ["bucket", "latents", "tokens", "batch", "TFLOP", "passes", "GiB", "peak", "GiB", "step"]
    assert lines[1].split() == ["a", "3x4x4", "12,345", "2", "10", "29.00", "30.00", "2", "s"]
    assert lines[2].split()[-2:] == ["200.00", "unknown"]
    assert lines[4].startswith("peak 200.00 GiB on one GPU, in b: 1.00 weights")
    assert "; does not fit h200's 139 GiB" in lines[4]
    assert "fit" not in recipe_text(plan, replace(REFERENCE, memory_gib=0.0)).splitlines()[4]
    assert lines[6] == "3,000 steps: unknown"
