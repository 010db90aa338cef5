"""The share of fine detail, by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from luve_lightning.data.video_files import read_video
from luve_lightning.functional.pixels import frames_to_video, resize_video, video_to_frames
from luve_lightning.metrics import HighFrequencyShare


def frames_of(luma: Tensor) -> Tensor:
    return luma.round().clamp(0, 255).to(torch.uint8)[None, :, :, None].expand(3, -1, -1, 3)


@pytest.mark.parametrize(("fine", "share"), [(0.0, 0.0), (20.0, 0.2), (40.0, 0.5)])
def test_two_gratings_share_by_their_power(fine: float, share: float) -> None:
    x = torch.arange(96.0)
    levels = 128 + 40 * torch.cos(2 * math.pi * x * 12 / 96) + fine * torch.cos(2 * math.pi * x * 36 / 96)
    for luma in (levels.expand(61, -1), levels[:, None].expand(-1, 61)):
        assert HighFrequencyShare().score(frames_of(luma)) == pytest.approx(share, abs=0.004)


def test_noise_and_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = frames_of(128 + 40 * torch.randn(90, 110, generator=generator))
    assert HighFrequencyShare().score(noise) == pytest.approx(1 - math.pi / 16, abs=0.02)
    assert HighFrequencyShare().score(torch.full((2, 9, 7, 3), 77, dtype=torch.uint8)) < 1


def test_enlarging_a_smaller_video_takes_it_away(tiny_clips: Path) -> None:
    original = torch.from_numpy(read_video(sorted((tiny_clips / "clips").glob("*.mp4"))[0])[0])
    small = resize_video(frames_to_video(original)[None], (32, 32))
    enlarged = video_to_frames(resize_video(small, (64, 64)))[0]
    metric = HighFrequencyShare()
    assert 0 < 2 * metric.score(enlarged) < metric.score(original) < 0.5
    metric.update(original)
    metric.update(enlarged)
    assert metric.compute().item() == pytest.approx(
        (metric.score(original) + metric.score(enlarged)) / 2, rel=1e-12
    )
