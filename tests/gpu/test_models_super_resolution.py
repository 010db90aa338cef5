"""Super-resolution on a GPU, in float32 and bfloat16, against a CPU; tiles and chunks give the whole."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from luve_lightning.models.super_resolution import RealBasicVSR, RRDBNet
from tests.helpers.gpu import FLOAT32, assert_rounds_like, coarse, error
from tests.models.test_super_resolution import tiny, video


@torch.no_grad()
@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", [RealBasicVSR, RRDBNet])
def test_it_gives_what_the_cpu_gives(device: torch.device, kind: type[RealBasicVSR | RRDBNet], batch: int) -> None:
    net, clips = coarse(tiny(kind, channels=32)), video(batch, 4, 48, 40).bfloat16().float()
    exact, plain = net(clips), deepcopy(net).bfloat16()(clips)
    net.to(device)
    got = net(clips.to(device))
    assert got.device.type == device.type
    assert error(got, exact) < FLOAT32
    for tile, chunk in ((24, 2), (25, 3)):
        assert error(net(clips.to(device), tile, chunk), exact) < FLOAT32
    half = net.bfloat16()(clips.to(device))
    assert half.dtype == torch.float32
    assert_rounds_like(half, plain, exact)


@torch.no_grad()
@pytest.mark.only_gpu
def test_memory_is_that_of_a_tile_and_a_chunk(device: torch.device) -> None:
    """Published size, 720 x 1280, and a length of which no features fit beside each other."""
    net = RealBasicVSR().to(device, torch.bfloat16).eval()
    clip = torch.rand(1, 3, 24, 720, 1280, device=device) * 2 - 1
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    for _ in net.stream(clip, 256, 4):
        pass
    peak = (torch.cuda.max_memory_allocated(device) - before) / 2**30
    assert peak < 6, f"{peak:.1f} GiB"
