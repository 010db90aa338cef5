"""Attention to the nearest tiles is dense attention under the mask of the tiles, by either kernel."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luve_lightning.functional.frequency import Grid
from luve_lightning.models.attention import Attention, Where, tiles
from luve_lightning.models.attention.dense import Dense
from luve_lightning.models.attention.tiles import Tiles
from tests.helpers.masked_attention import assert_attends, drawn, positions

SIZES = st.tuples(*[st.integers(1, 6)] * 3)


def mask_of(grid: Grid, tile: Grid, reach: Grid) -> Tensor:
    def attends(token: tuple[int, ...], other: tuple[int, ...]) -> bool:
        for i, j, size, length, near in zip(token, other, grid, tile, reach, strict=True):
            count = -(-size // length)
            near = min(near, count)
            first = min(max(i // length - near // 2, 0), count - near)
            if not first <= j // length < first + near:
                return False
        return True

    tokens = positions(grid)
    return torch.tensor([[attends(token, other) for other in tokens] for token in tokens])


@settings(max_examples=30, deadline=None)
@given(SIZES, SIZES, SIZES)
def test_any_grid_tile_and_reach(grid: Grid, tile: Grid, reach: Grid) -> None:
    assert_attends(Tiles(tile, reach), Where(grid, 0), [mask_of(grid, tile, reach)])


@pytest.mark.parametrize(
    ("grid", "tile", "reach"),
    [
        ((3, 3, 4), (2, 2, 3), (1, 2, 1)),  # every tile in part of one block
        ((1, 14, 13), (1, 8, 16), (1, 1, 1)),  # a tile of a whole block, and one of 78 tokens
        ((2, 11, 13), (2, 12, 14), (1, 1, 1)),  # one tile of three blocks
        ((3, 8, 16), (1, 8, 16), (2, 1, 1)),  # nothing is padded
        ((5, 2, 1), (2, 1, 1), (1, 2, 1)),
    ],
    ids=str,
)
def test_the_kernel_of_blocks(grid: Grid, tile: Grid, reach: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_by_blocks", lambda query: True)
    assert_attends(Tiles(tile, reach), Where(grid, 0), [mask_of(grid, tile, reach)])


def test_full_reach_is_dense() -> None:
    inputs = drawn((2, 3, 5))
    got = Tiles((1, 2, 2), (2, 2, 3))(*inputs, Where((2, 3, 5), 0))
    torch.testing.assert_close(got, Dense()(*inputs, Where((2, 3, 5), 0)))


def test_pairs_at_2k() -> None:
    # 4 x 3 x 3 tiles of 4 x 8 x 8 tokens around each: 3.8 % of 191,360 tokens squared.
    along_rows = 24 * (88 - 8) + (4 + 8) * (16 + 4)  # the last tile of 12 has 4 rows: it and the one before reach 20
    pairs = Tiles((4, 8, 8), (4, 3, 3)).pairs((13, 92, 160), 0, 0.5)
    assert pairs == 13**2 * along_rows * (160 * 24)


@pytest.mark.parametrize("name", ["tile", "reach"])
def test_settings_are_checked(name: str) -> None:
    record = {"name": "Tiles", "tile": [1, 2, 2], "reach": [1, 3, 3]}
    for wrong in ([1, 2], [0, 1, 1], "123", None, [1, True, 1]):
        with pytest.raises(ValueError, match=f"attention Tiles: {name}: expected 3 whole numbers of at least 1, got"):
            Attention.from_record(record | {name: wrong})
    with pytest.raises(ValueError, match=r"attention Tiles: .*reach"):
        Attention.from_record({"name": "Tiles", "tile": [1, 2, 2]})


@settings(max_examples=25, deadline=None)
@given(SIZES, SIZES, st.lists(st.integers(0, 40), max_size=3), st.none() | st.floats(0.01, 1), st.booleans())
def test_settings_survive_json(tile: Any, reach: Any, layers: Any, above: Any, linear: bool) -> None:
    attention = Tiles(list(tile), list(reach), dense_layers=layers, dense_above=above, linear=linear)  # type: ignore[arg-type]
    assert Attention.from_record(json.loads(json.dumps(attention.record()))) == attention


def test_bfloat16_and_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [x[:1].detach().bfloat16() for x in drawn((2, 5, 3))]
    attention = Tiles((1, 2, 2), (1, 2, 1))
    want = attention(*(x.double() for x in inputs), Where((2, 5, 3), 0))
    for by_blocks in (False, True):
        monkeypatch.setattr(tiles, "_by_blocks", lambda query, by_blocks=by_blocks: by_blocks)
        got = attention(*inputs, Where((2, 5, 3), 0))
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, rtol=0, atol=0.02)


def test_the_meta_device_needs_no_mask_of_all_pairs() -> None:
    query = torch.empty(1, 13 * 92 * 160, 1, 16, device="meta")
    attention = Tiles((4, 8, 8), (4, 3, 3), linear=True)
    with query.device:
        branch = attention.branch(1, 16)
    assert attention(query, query, query, Where((13, 92, 160), 0), branch).shape == query.shape
