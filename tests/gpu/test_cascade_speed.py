"""The pipeline on a GPU, offloaded from it and compiled, against a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luve_lightning.cascade import LuVePipeline, SpeedOptions
from tests.helpers.gpu import error
from tests.helpers.tiny_luve import EXPERTS, PROMPT, seeded, tiny_luve
from tests.helpers.wide_wan import wide_transformer

RUN: dict[str, Any] = {
    "height": 64, "width": 96, "num_frames": 5, "steps": 4, "skip_steps": 0, "output_type": "latent"
}  # fmt: skip


def video(pipeline: LuVePipeline, **changes: Any) -> Tensor:
    frames: Tensor = pipeline(PROMPT, **RUN | changes, generator=seeded()).frames
    return frames


def test_on_a_gpu_and_offloaded_from_it(device: torch.device, tiny_backbone: Path) -> None:
    want = video(tiny_luve(tiny_backbone, EXPERTS))
    on_gpu = tiny_luve(tiny_backbone, EXPERTS).to(device)
    got = video(on_gpu)
    assert got.device.type == device.type
    assert (got.cpu() - want).abs().mean() < 0.05 * want.std()  # convolutions are TF32 there
    if device.type == "cpu":
        return
    offloaded = tiny_luve(tiny_backbone, EXPERTS)
    offloaded.apply(SpeedOptions(offload=True))
    for method in ("vluer", "rgb"):
        assert torch.equal(video(offloaded, upsampling=method), video(on_gpu, upsampling=method))
    assert all(part.device.type == "cpu" for part in (offloaded.transformer, offloaded.vae, offloaded.vluer))
    frames = offloaded(PROMPT, **RUN | {"output_type": "np"}, generator=seeded()).frames
    assert frames.shape == (1, 5, 64, 96, 3)


@pytest.mark.only_gpu
@pytest.mark.parametrize("backend", ["_native_cudnn", "_native_flash", "_native_efficient"])
def test_each_attention_backend_gives_the_same(tiny_backbone: Path, device: torch.device, backend: str) -> None:
    """Those of PyTorch, in bfloat16, with heads of real width."""
    plain, other = (
        tiny_luve(tiny_backbone, EXPERTS, transformer=wide_transformer(text_dim=16)).to(device, torch.bfloat16)
        for _ in range(2)
    )
    other.apply(SpeedOptions(attention_backend=backend))
    assert error(video(other), video(plain)) < 0.1  # bfloat16 itself is off by 0.036 after eight passes
