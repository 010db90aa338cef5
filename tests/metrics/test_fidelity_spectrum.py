"""The distance of spectra: decades, by construction."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from luve_lightning.data.video_files import read_video
from luve_lightning.functional.pixels import frames_to_video, resize_video, video_to_frames
from luve_lightning.metrics import HighFrequencyShare, SpectralDistance


def noise(deviation: float, seed: int = 0, frames: int = 12) -> Tensor:
    """Grey noise around the middle."""
    generator = torch.Generator().manual_seed(seed)
    values = 128 + deviation * torch.randn(frames, 48, 64, 1, generator=generator)
    return values.round().clamp(0, 255).to(torch.uint8).expand(-1, -1, -1, 3)


def test_ten_times_the_power_is_one_decade() -> None:
    metric = SpectralDistance()
    strong, weak = noise(30), noise(30 / 10**0.5)
    assert metric.score(strong, weak) == pytest.approx(1, abs=0.03)
    assert metric.score(weak, strong) == metric.score(strong, weak)
    assert metric.score(strong, strong) == 0
    # Other noise of the same kind: only its spectrum counts.
    assert metric.score(strong, noise(30, seed=1)) < 0.05


def test_one_band_of_eight_is_an_eighth() -> None:
    """The same noise with and without a grating in the fourth of eight bands."""
    generator = torch.Generator().manual_seed(0)
    plain = 128 + 10 * torch.randn(8, 64, 128, generator=generator)
    striped = plain + 50 * torch.cos(2 * math.pi * 28 / 128 * torch.arange(128))
    video, original = (
        luma.round().clamp(0, 255).to(torch.uint8)[..., None].expand(-1, -1, -1, 3) for luma in (striped, plain)
    )
    density = 50**2 / 2 / (math.pi / 4 * (0.5**2 - 0.375**2))  # over the band's part of the plane
    decades = math.log10((density + 10**2) / 10**2)
    assert SpectralDistance(bands=8).score(video, original) == pytest.approx(decades / 8, rel=0.05)


def test_flat_videos_have_a_distance() -> None:
    black = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    assert SpectralDistance().score(black, black + 200) == pytest.approx(0, abs=1e-4)
    assert 2 < SpectralDistance().score(black, noise(30)[:2, :, :64].repeat(1, 2, 1, 1)[:, :64]) < 6


def test_what_is_blurred_more_is_farther(tiny_clips: Path) -> None:
    original = torch.from_numpy(read_video(sorted((tiny_clips / "clips").glob("*.mp4"))[0])[0])

    def blurred(side: int) -> Tensor:
        small = resize_video(frames_to_video(original)[None], (side, side))
        return video_to_frames(resize_video(small, (64, 64)))[0]

    distances = [SpectralDistance().score(blurred(side), original) for side in (48, 32, 16)]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_bad_input_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^bands: expected at least 1, got 0$"):
        SpectralDistance(bands=0)
    small = torch.zeros(1, 20, 16, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^spectral_distance: frames of 20x16 are too small for 16 bands, at most 10"):
        SpectralDistance().score(small, small)
    assert SpectralDistance(bands=10).score(small, small) == 0


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
    assert metric.compute().item() == pytest.approx((metric.score(original) + metric.score(enlarged)) / 2, rel=1e-12)
