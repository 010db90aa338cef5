"""Collages: the same for the same clip, new for another seed, of the clip's own size, range and motion."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning.data.encode_clips import variant_name
from luve_lightning.data.variants import Collage


def clips(batch: int, frames: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(7)) * 2 - 1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(8, 40), st.integers(8, 40), st.integers(0, 5))
def test_size_range_and_repeatability(batch: int, frames: int, height: int, width: int, pieces: int) -> None:
    video, collage = clips(batch, frames, height, width), Collage(3, pieces)
    out = collage(video)
    assert out.shape == video.shape
    assert out.isfinite().all()
    assert out.abs().max() <= 1
    assert torch.equal(out, collage(video.clone()))
    # Whatever else is in the batch.
    assert torch.equal(out[-1:], collage(video[-1:]))


def test_seeds_and_clips_differ() -> None:
    video = clips(2, 2, 24, 24)
    assert not torch.equal(Collage(0)(video), Collage(1)(video))
    first, second = Collage(0, pieces=0)(torch.stack([video[0], video[0] * 0.5]))
    assert (first - second).abs().mean() > 0.05, "the random numbers come from the pixels too"


def test_frames_that_are_equal_stay_equal() -> None:
    still = clips(1, 1, 24, 24).expand(-1, -1, 4, -1, -1)
    out = Collage(2)(still)
    assert torch.equal(out[:, :, 1:], out[:, :, :1].expand(-1, -1, 3, -1, -1))


def test_a_plain_picture_gives_plain_pieces() -> None:
    flat = torch.full((1, 3, 1, 32, 32), 0.25)
    one = Collage(5, pieces=0)(flat)
    assert (one.flatten(2).std(2) < 1e-5).all()
    several = Collage(5, pieces=4)(flat)
    assert several.flatten(2).std(2).max() > 0.05


def test_pieces_hold_detail_of_other_scales() -> None:
    """Enlarged pieces of a fine checkerboard are coarser: the power moves down."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    board = ((x // 2 + y // 2) % 2).float().mul(1.6).sub(0.8).expand(1, 3, 1, 64, 64)
    change = [
        (Collage(0, 0, (z, z))(board).diff(dim=4).abs().mean() / Collage(0, 0, (z, z))(board).std()).item()
        for z in (1.0, 3.0)
    ]
    assert change[1] < 0.6 * change[0]


def test_names_and_mistakes() -> None:
    assert variant_name("c1", Collage(1)) == "c1 (seed 1, 4 pieces, zoom 0.5 to 1.5)"
    for make, message in (
        (lambda: Collage(-1), "expected seed >= 0 and pieces >= 0, got -1 and 4"),
        (lambda: Collage(0, -1), "got 0 and -1"),
        (lambda: Collage(0, 4, (2.0, 1.0)), "zoom: expected 0 < least <= greatest"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
