"""Flaws of a take: each does to frames what its name says, by a plain reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from luve_lightning.functional import takes


@pytest.fixture(scope="module")
def frames() -> Tensor:
    rng = np.random.default_rng(0)
    smooth = gaussian_filter(rng.standard_normal((9, 40, 56, 3)), (0, 3, 3, 0))
    return torch.from_numpy((128 + 300 * smooth).clip(0, 255).astype(np.uint8))


def test_blur_is_a_gaussian(frames: Tensor) -> None:
    expected = gaussian_filter(frames.double().numpy(), (0, 1.5, 1.5, 0), mode="reflect")
    assert np.abs(takes.blurred(frames, 1.5).numpy() - expected).max() <= 0.51


def test_noise_has_its_deviation_and_differs_from_frame_to_frame(frames: Tensor) -> None:
    grey = torch.full_like(frames, 128)
    noise = takes.noisy(grey, 20.0, np.random.default_rng(1)).double() - 128
    assert noise.std() == pytest.approx(20, rel=0.02)
    assert abs(noise.mean()) < 0.5
    assert torch.corrcoef(torch.stack([noise[0].flatten(), noise[1].flatten()]))[0, 1].abs() < 0.05


def test_compression_leaves_steps_at_the_borders_of_blocks(frames: Tensor) -> None:
    steps = takes.compressed(frames, 6).double().diff(dim=2).abs().mean((0, 1, 3))
    assert steps[7::8].mean() > 2 * steps[3::8].mean()
    assert takes.compressed(frames, 95).sub(frames.int()).abs().double().mean() < 3


def test_exposure_is_a_factor_under_a_veil(frames: Tensor) -> None:
    levels = torch.tensor([0, 50, 100, 255], dtype=torch.uint8).view(1, 2, 2, 1).expand(1, 2, 2, 3)
    assert takes.exposed(levels, 0.2)[..., 0].flatten().tolist() == [0, 10, 20, 51]
    assert takes.exposed(levels, 2.0, veil=0.4)[..., 0].flatten().tolist() == [102, 162, 222, 255]


def test_what_stands_still_repeats_frames(frames: Tensor) -> None:
    numbered = torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1).expand(9, 2, 2, 3)
    assert takes.stuttering(numbered, 4)[:, 0, 0, 0].tolist() == [0, 0, 0, 0, 4, 4, 4, 4, 8]
    assert takes.frozen_from(numbered, 0.75)[:, 0, 0, 0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 2]
    assert takes.frozen_from(numbered, 1.0)[:, 0, 0, 0].tolist() == [0] * 9


def test_a_shaken_frame_is_part_of_the_frame(frames: Tensor) -> None:
    shaken = takes.shaken(frames, 6, 4.0, np.random.default_rng(2))
    assert shaken.shape == (9, 28, 44, 3)
    places = []
    for frame, part in zip(frames, shaken, strict=True):
        found = [
            (y, x) for y in range(13) for x in range(13) if torch.equal(frame[y : y + 28, x : x + 44], part)
        ]  # fmt: skip
        places += found
        assert len(found) == 1
    assert np.std(places) == pytest.approx(4, rel=0.4)
    assert torch.equal(takes.shaken(frames, 6, 0.0, np.random.default_rng(2)), frames[:, 6:-6, 6:-6])
