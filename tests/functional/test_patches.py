"""Patches against plain slices."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning.functional.patches import PatchPlan, cut_patches

FRAMES = torch.randint(0, 256, (5, 40, 61, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("placement", ["grid", "random", "both"])
def test_patches_are_slices_of_the_frames(placement: Any) -> None:
    plan = PatchPlan(size=16, placement=placement, per_frame=5, frames=3)
    places = plan.places(*FRAMES.shape[:3], "a")
    want = [FRAMES[t, y : y + 16, x : x + 16].permute(2, 0, 1) for t, y, x in places.tolist()]
    patches = plan.cut(FRAMES, "a")
    assert torch.equal(patches, torch.stack(want))
    assert len(patches) == 3 * {"grid": 2 * 3, "random": 5, "both": 11}[placement]
    # Not a view: what is done to a patch is not done to the frame.
    assert patches.untyped_storage().data_ptr() != FRAMES.untyped_storage().data_ptr()


def test_frames_that_are_not_contiguous_give_the_same_patches() -> None:
    plan = PatchPlan(size=16, frames=3)
    planar = FRAMES.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(plan.cut(planar), plan.cut(FRAMES))
    assert torch.equal(
        cut_patches(FRAMES.flip(0), torch.tensor([[0, 1, 2]]), 7), cut_patches(FRAMES, torch.tensor([[4, 1, 2]]), 7)
    )


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 30), extra=st.tuples(st.integers(0, 90), st.integers(0, 90)))
def test_the_grid_lies_side_by_side_and_reaches_every_edge(size: int, extra: tuple[int, int]) -> None:
    height, width = size + extra[0], size + extra[1]
    [corners] = PatchPlan(size=size).positions(height, width)
    tops, lefts = (sorted(set(axis.tolist())) for axis in corners.unbind(1))
    assert len(corners) == len(tops) * len(lefts)
    for places, length in ((tops, height), (lefts, width)):
        assert len(places) == length // size
        assert all(b - a >= size for a, b in pairwise(places))
        if len(places) > 1:
            assert (places[0], places[-1]) == (0, length - size)
        else:
            assert places == [(length - size) // 2]


def test_a_grid_of_given_rows_and_columns_may_overlap() -> None:
    [corners] = PatchPlan(size=16, grid=(3, 1)).positions(40, 61)
    assert corners.tolist() == [[0, 22], [12, 22], [24, 22]]


@settings(max_examples=40, deadline=None)
@given(height=st.integers(8, 20), width=st.integers(8, 20), seed=st.integers(0, 10), key=st.text(max_size=5))
def test_random_patches_lie_inside_and_repeat(height: int, width: int, seed: int, key: str) -> None:
    plan = PatchPlan(size=8, placement="random", per_frame=20, seed=seed)
    corners = plan.positions(height, width, key, frames=3)
    assert corners.shape == (3, 20, 2)
    assert (corners >= 0).all()
    assert (corners <= torch.tensor([height - 8, width - 8])).all()
    assert torch.equal(corners, plan.positions(height, width, key, frames=3))


def test_random_patches_reach_both_ends_and_differ_by_frame_video_and_seed() -> None:
    plan = PatchPlan(size=8, placement="random", per_frame=200)
    corners = plan.positions(10, 11, "a", frames=2)
    assert corners.flatten(0, 1).amin(0).tolist() == [0, 0]
    assert corners.flatten(0, 1).amax(0).tolist() == [2, 3]
    assert not torch.equal(corners[0], corners[1])
    assert not torch.equal(corners, plan.positions(10, 11, "b", frames=2))
    other = PatchPlan(size=8, placement="random", per_frame=200, seed=1)
    assert not torch.equal(corners, other.positions(10, 11, "a", frames=2))


def test_drawing_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    PatchPlan(size=8, placement="both").cut(FRAMES, "a")
    assert torch.equal(before, torch.get_rng_state())


def test_frames_are_the_middles_of_equal_parts() -> None:
    assert PatchPlan(frames=8).frame_indices(49) == (3, 9, 15, 21, 27, 33, 39, 45)
    assert PatchPlan(frames=8).frame_indices(8) == tuple(range(8))
    assert PatchPlan(frames=8).frame_indices(3) == (0, 1, 2)
    assert PatchPlan(frames=1).frame_indices(9) == (4,)
    with pytest.raises(ValueError, match="without frames"):
        PatchPlan().frame_indices(0)


def test_frames_smaller_than_a_patch_are_refused() -> None:
    for height, width in ((15, 99), (99, 15)):
        with pytest.raises(
            ValueError, match=rf"^frames are {height}x{width}, smaller than a patch of 16 \(patches.size\)$"
        ):
            PatchPlan(size=16).positions(height, width)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"placement": "corner"}, "patches.placement 'corner': expected grid, random or both"),
        ({"size": 0}, "patches.size 0: expected an integer >= 1"),
        ({"frames": 2.5}, "patches.frames 2.5"),
        ({"per_frame": -1}, "patches.per_frame -1"),
        ({"grid": (3, 0)}, "patches.grid"),
        ({"grid": (3,)}, "patches.grid"),
    ],
)
def test_wrong_configuration_names_the_key(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchPlan(**values)
