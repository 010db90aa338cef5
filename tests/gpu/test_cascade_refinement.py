"""The refinements that need no training on a GPU: against a CPU, offloaded, compiled, in bfloat16 and with windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luve_lightning.cascade import LuVePipeline, SpeedOptions
from luve_lightning.models.attention.windows import Windows
from luve_lightning.models.backbones import denoiser_of
from tests.helpers.tiny_luve import EXPERTS, seeded, tiny_luve

RUN: dict[str, Any] = {
    "height": 64, "width": 96, "num_frames": 5, "steps": 4, "skip_steps": 1, "upsampling": "latent",
    "output_type": "latent",
}  # fmt: skip
PROMPTS = ["a red boat", "squares", "x"]


def video(pipeline: LuVePipeline, refinement: str, **changes: Any) -> Tensor:
    frames: Tensor = pipeline(PROMPTS, **RUN | changes, refinement=refinement, generator=seeded()).frames
    return frames


@pytest.mark.parametrize("refinement", ["cinescale", "demofusion", "lsrna"])
def test_it_refines_as_on_a_cpu(device: torch.device, tiny_backbone: Path, refinement: str) -> None:
    want = video(tiny_luve(tiny_backbone, EXPERTS), refinement)
    pipeline = tiny_luve(tiny_backbone, EXPERTS).to(device)
    got = video(pipeline, refinement)
    assert got.device.type == device.type
    # Convolutions are TF32 there; a pixel at Canny's threshold may fall on its other side.
    assert (got.cpu() - want).abs().mean() < 0.05 * want.std()
    if device.type == "cuda":
        offloaded = tiny_luve(tiny_backbone, EXPERTS)
        offloaded.apply(SpeedOptions(offload=True))
        assert torch.equal(video(offloaded, refinement), got)
        assert torch.equal(video(offloaded, "luve"), video(pipeline, "luve")), "the rotary embedding is back"


@pytest.mark.parametrize("refinement", ["cinescale", "demofusion"])
def test_in_bfloat16_with_windows_and_compiled(device: torch.device, tiny_backbone: Path, refinement: str) -> None:
    pipeline = tiny_luve(tiny_backbone, EXPERTS).to(device, torch.bfloat16)
    denoiser_of(pipeline.transformer).use_attention(Windows(((1, 2, 2),)))
    plain = video(pipeline, refinement, guidance=1.0)
    denoiser_of(pipeline.transformer).compile_blocks("inductor" if device.type == "cuda" else "eager")
    compiled = video(pipeline, refinement, guidance=1.0)
    torch._dynamo.reset()
    assert compiled.isfinite().all()
    assert (compiled - plain).abs().mean() < 0.1 * plain.std()
