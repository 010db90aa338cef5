"""Attention within windows is dense attention under the mask of the windows."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luve_lightning.functional.frequency import Grid
from luve_lightning.models.attention import Attention, Where
from luve_lightning.models.attention.dense import Dense
from luve_lightning.models.attention.windows import Windows
from tests.helpers.masked_attention import assert_attends, drawn, positions

SIZES = st.tuples(*[st.integers(1, 5)] * 3)
CUTS = st.tuples(*[st.integers(1, 6)] * 3)


def window_along(position: int, size: int, n: int, way: str) -> int:
    """The window of a position along an axis."""
    n = min(n, size)
    if way == "remote":
        return position % n
    lengths = [size // n + (window < size % n) for window in range(n)]
    return next(window for window in range(n) if position < sum(lengths[: window + 1]))


def mask_of(grid: Grid, cut: Grid, way: str) -> Tensor:
    windows = [
        tuple(window_along(i, size, n, way) for i, size, n in zip(token, grid, cut, strict=True))
        for token in positions(grid)
    ]
    return torch.tensor([[mine == other for other in windows] for mine in windows])


@settings(max_examples=30, deadline=None)
@given(SIZES, CUTS, st.sampled_from(["close", "remote", "both"]))
def test_any_grid_and_cut(grid: Grid, cut: Grid, way: Any) -> None:
    masks = [mask_of(grid, cut, each) for each in (("close", "remote") if way == "both" else (way,))]
    if way == "both" and torch.equal(*masks):
        masks = masks[:1]  # computed once
    assert_attends(Windows((cut,), way), Where(grid, 0), masks)


@pytest.mark.parametrize(
    ("grid", "cut"),
    [((3, 1, 4), (3, 1, 1)), ((2, 5, 3), (2, 3, 1)), ((1, 7, 2), (1, 2, 1)), ((5, 2, 2), (2, 1, 1))],
    ids=str,
)
def test_windows_of_successive_tokens(grid: Grid, cut: Grid) -> None:
    assert_attends(Windows((cut,), "close"), Where(grid, 0), [mask_of(grid, cut, "close")])


def test_one_window_is_dense_to_the_bit() -> None:
    inputs = drawn((2, 3, 5))
    for ways in ("both", "close", "remote", "alternate"):
        got = Windows(((1, 1, 1),), ways)(*inputs, Where((2, 3, 5), 0))
        assert torch.equal(got, Dense()(*inputs, Where((2, 3, 5), 0)))


def test_layers_go_round_the_cuts() -> None:
    grid, cuts = (3, 5, 4), ((3, 1, 1), (1, 2, 3))
    for layer in range(5):
        cut = cuts[layer % 2]
        assert_attends(Windows(cuts, "remote"), Where(grid, layer), [mask_of(grid, cut, "remote")])
        way = "remote" if layer in (2, 3) else "close"
        assert_attends(Windows(cuts, "alternate"), Where(grid, layer), [mask_of(grid, cut, way)])


def test_the_published_cycle_costs_what_t3_video_says() -> None:
    cuts = ((21, 1, 1), (1, 17, 30), (1, 8, 40), (3, 17, 8), (7, 8, 6))
    grid = (21, 136, 240)
    tokens = 21 * 136 * 240
    windows = Windows(cuts)
    pairs = [windows.pairs(grid, layer, 0.5) for layer in range(5)]
    # Windows of equal size; a cut into single frames is the same both ways.
    assert pairs == [tokens**2 // 21, *(2 * tokens**2 // (t * h * w) for t, h, w in cuts[1:])]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cuts": []}, r"attention Windows: cuts: expected a list of cuts such as \[\[1, 4, 4\]\], got \[\]"),
        ({"cuts": 3}, "cuts: expected a list of cuts"),
        ({"cuts": [[1, 2]]}, r"cuts: expected 3 whole numbers of at least 1, got \[1, 2\]"),
        ({"cuts": [[1, 2, 0]]}, "cuts: expected 3 whole numbers of at least 1"),
        ({"cuts": [[1, 2, 2.5]]}, "cuts: expected 3 whole numbers of at least 1"),
        ({"cuts": [4]}, "cuts: expected 3 whole numbers of at least 1, got 4"),
        ({"cuts": [[1, 2, 2]], "ways": "near"}, "ways: expected one of both, close, remote, alternate, got 'near'"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention.from_record({"name": "Windows", **settings})


@settings(max_examples=25, deadline=None)
@given(
    st.lists(CUTS, min_size=1, max_size=4),
    st.sampled_from(["both", "close", "remote", "alternate"]),
    st.lists(st.integers(0, 40), max_size=3),
    st.none() | st.floats(0.01, 1),
    st.booleans(),
)
def test_settings_survive_json(cuts: Any, ways: Any, layers: Any, above: Any, linear: bool) -> None:
    windows = Windows(cuts, ways, dense_layers=layers, dense_above=above, linear=linear)
    assert Attention.from_record(json.loads(json.dumps(windows.record()))) == windows


def test_bfloat16_and_one_sample() -> None:
    inputs = [x[:1].detach().bfloat16() for x in drawn((2, 5, 3))]
    windows = Windows(((1, 2, 2),))
    got = windows(*inputs, Where((2, 5, 3), 0))
    want = windows(*(x.double() for x in inputs), Where((2, 5, 3), 0))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=0, atol=0.02)
