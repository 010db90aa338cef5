"""Measured motion: photographs moved by a known way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning.functional.spectra import between_grids, luma_of
from luve_lightning.metrics.detail_coherence import dense_flow, smoothed, warped
from tests.helpers.scenes import panned, photograph


@pytest.mark.parametrize("move", [(0.0, 0.0), (1.3, -0.6), (-5.25, 3.5), (11.0, 7.0)])
def test_a_moved_camera_is_followed(move: tuple[float, float]) -> None:
    luma = luma_of(panned("astronaut", move, frames=2))
    flow = dense_flow(luma[:1], luma[1:])[0, :, 16:-16, 16:-16]
    # The camera goes to the right, what it sees to the left.
    found = flow.flatten(1).median(1).values
    torch.testing.assert_close(found, -torch.tensor(move), atol=0.03, rtol=0)
    away = (flow + torch.tensor(move).view(2, 1, 1)).norm(dim=0)
    assert away.quantile(0.8) < 0.5


def test_two_parts_move_two_ways() -> None:
    left, right = luma_of(panned("astronaut", (2, 0), frames=2)), luma_of(panned("astronaut", (0, -3), frames=2))
    both = torch.cat([left[..., :64], right[..., 64:]], -1)
    flow = dense_flow(both[:1], both[1:])[0, :, 16:-16]
    torch.testing.assert_close(flow[:, :, 16:44].flatten(1).median(1).values, torch.tensor([-2.0, 0]), atol=0.1, rtol=0)
    torch.testing.assert_close(flow[:, :, 84:112].flatten(1).median(1).values, torch.tensor([0, 3.0]), atol=0.1, rtol=0)


def test_pictures_without_a_finest_octave_need_it_not() -> None:
    luma = luma_of(panned("astronaut", (3.0, -1.5), frames=2))
    smooth = between_grids(luma, None, (64, 64))
    whole, half = (dense_flow(smooth[:1], smooth[1:], finest=octaves)[0, :, 16:-16, 16:-16] for octaves in (0, 1))
    assert (whole - half).norm(dim=0).quantile(0.8) < 0.3
    torch.testing.assert_close(half.flatten(1).median(1).values, torch.tensor([-3.0, 1.5]), atol=0.1, rtol=0)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3))
def test_any_size_and_batch_and_nothing_to_follow(height: int, width: int, batch: int) -> None:
    flat = torch.full((batch, height, width), 0.3)
    assert dense_flow(flat, flat).abs().max() < 1e-6
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, batch, height, width, generator=generator)
    flow = dense_flow(first, second)
    assert flow.shape == (batch, 2, height, width)
    assert flow.isfinite().all()
    torch.testing.assert_close(dense_flow(first[:1], second[:1]), flow[:1], atol=1e-3, rtol=1e-3)


def test_fetching_by_whole_pixels_is_a_shift() -> None:
    picture = photograph("camera", 48).movedim(-1, 1).float()
    flow = torch.tensor([3.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, 48, 48)
    torch.testing.assert_close(warped(picture, flow)[..., 8:40, 8:40], picture[..., 6:38, 11:43], atol=0.01, rtol=0)


def test_smoothing_keeps_what_is_even() -> None:
    even = torch.full((2, 3, 9, 13), 0.7)
    torch.testing.assert_close(smoothed(even, 3.0), even)
    point = torch.zeros(1, 1, 31, 31)
    point[..., 15, 15] = 1
    spread = smoothed(point, 2.0)[0, 0]
    torch.testing.assert_close(spread.sum(), torch.tensor(1.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(spread[15, 17] / spread[15, 15], torch.tensor(-0.5).exp())


def test_bad_input_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^flow: expected two floating point N x H x W of one shape, got float32"):
        dense_flow(torch.zeros(1, 4, 4), torch.zeros(1, 4, 5))
