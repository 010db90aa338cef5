"""Attention within windows of the token grid."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from luve_lightning.functional.frequency import Grid
from luve_lightning.models.attention.sparse import IndexTable, SparseAttention, indices, rows, take

Way = Literal["close", "remote"]
Ways = Literal["both", "close", "remote", "alternate"]


@dataclass(frozen=True)
class Windows(SparseAttention):
    """Attention within windows, as in T3-Video (arXiv 2512.13492), for a token grid of any size.

    A cut `(n_t, n_h, n_w)` makes n_t x n_h x n_w windows, in one of two ways. "close": consecutive tokens along
    each axis share a window. "remote": token i of an axis belongs to window i mod n, so that each window spans the
    whole video. An axis of fewer than n tokens makes one window a token; where n does not divide it, windows differ
    by one token. A window attends only to itself, and nothing is padded or masked.

    Args:
        cuts: cut of each layer; layer i uses `cuts[i % len(cuts)]`. (1, 1, 1) is dense attention.
        ways: "both" is the mean of the attentions in close and in remote windows; "close" and "remote" are one of
            them; "alternate" is close in the first round through `cuts`, remote in the second, and so on.
        dense_layers: see SparseAttention.
        dense_above: see SparseAttention.
        linear: see SparseAttention.

    Raises:
        ValueError: for settings outside these.
    """

    cuts: tuple[Grid, ...]
    ways: Ways = "both"

    def __post_init__(self) -> None:
        """Check the settings; JSON's lists become tuples."""
        super().__post_init__()
        if not isinstance(self.cuts, list | tuple) or not self.cuts:
            raise self._wrong("cuts", "a list of cuts such as [[1, 4, 4]]", self.cuts)
        self._set("cuts", tuple(self._whole_numbers("cuts", cut, 1, 3) for cut in self.cuts))
        if self.ways not in get_args(Ways):
            raise self._wrong("ways", f"one of {', '.join(get_args(Ways))}", self.ways)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, layer: int) -> Tensor:
        """Attention within the windows of this layer; see SparseAttention."""
        assert query.shape[1] == prod(grid), f"{query.shape[1]} tokens of a grid of {grid}"
        cut, ways = self._partitions(grid, layer)
        outputs = [_within(query, key, value, grid, cut, way) for way in ways]
        return outputs[0] if len(outputs) == 1 else (outputs[0] + outputs[1]) / 2

    def sparse_pairs(self, grid: Grid, layer: int) -> int:
        """Query-key products of one head: over all windows, of both ways where both are computed, length squared."""
        cut, ways = self._partitions(grid, layer)
        return len(ways) * sum(windows * length**2 for windows, length in _batches(grid, cut, 1))

    def _partitions(self, grid: Grid, layer: int) -> tuple[Grid, tuple[Way, ...]]:
        """The cut of a layer on this grid, and the ways in which it is made."""
        turn, place = divmod(layer, len(self.cuts))
        t, h, w = (min(n, size) for n, size in zip(self.cuts[place], grid, strict=True))
        cut = (t, h, w)
        if all(n in (1, size) for n, size in zip(cut, grid, strict=True)):
            return cut, ("close",)  # both ways make the same windows
        if self.ways == "both":
            return cut, ("close", "remote")
        if self.ways == "alternate":
            return cut, ("remote",) if turn % 2 else ("close",)
        return cut, (self.ways,)


def _within(query: Tensor, key: Tensor, value: Tensor, grid: Grid, cut: Grid, way: Way) -> Tensor:
    """Attention within the windows of one partition."""
    batches = _batches(grid, cut, len(query))
    orders: list[Tensor] = []
    inputs = [rows(x) for x in (query, key, value)]
    if not _is_in_order(grid, cut, way, batches):
        orders = indices(window_order, query, (*grid, *cut, way == "remote", len(query)))
        inputs = [take(x, *orders) for x in inputs]
    counts = [windows * length for windows, length in batches]
    outputs = []
    for (windows, length), *parts in zip(batches, *(x.split(counts) for x in inputs), strict=True):
        q, k, v = (x.view(windows, length, *query.shape[2:]).transpose(1, 2) for x in parts)
        outputs.append(rows(F.scaled_dot_product_attention(q, k, v).transpose(1, 2)))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return (take(output, *orders[::-1]) if orders else output).view(query.shape)


def _sizes(size: int, n: int) -> list[tuple[int, int]]:
    """Number and length of the longer windows along an axis, then of the others; both where n does not divide it."""
    length, longer = divmod(size, n)
    return [(count, tokens) for count, tokens in ((longer, length + 1), (n - longer, length)) if count]


def _batches(grid: Grid, cut: Grid, samples: int) -> list[tuple[int, int]]:
    """Number and length of the windows of one length, at most eight of these, for all samples."""
    axes = [_sizes(size, n) for size, n in zip(grid, cut, strict=True)]
    return [(samples * a * b * c, i * j * k) for (a, i), (b, j), (c, k) in itertools.product(*axes)]


def _is_in_order(grid: Grid, cut: Grid, way: Way, batches: list[tuple[int, int]]) -> bool:
    """Whether the tokens of each window follow each other as they are, and so do the windows of one length."""
    axis = next((axis for axis in range(3) if cut[axis] < grid[axis]), 2)  # the first of windows above one token
    whole = way == "close" and all(n == 1 for n in cut[axis + 1 :])
    # Windows of two lengths along that axis alternate if there are more rows of it.
    return whole and (len(batches) == 1 or sum(windows for windows, _ in batches) == cut[axis])


def window_order(
    frames: int, height: int, width: int, n_t: int, n_h: int, n_w: int, remote: bool, samples: int
) -> list[IndexTable]:
    """The order of tokens that `_batches` describes: the token at each place, and the place of each token."""
    order = []
    axes = [_positions(size, n, remote) for size, n in ((frames, n_t), (height, n_h), (width, n_w))]
    for t, h, w in itertools.product(*axes):
        # windows along T, h, w, tokens along T, h, w
        tokens = (t[:, None, None, :, None, None] * height + h[:, None, None, :, None]) * width + w[:, None, None, :]
        order.append((tokens.ravel() + np.arange(samples)[:, None] * (frames * height * width)).ravel())
    token = np.concatenate(order)
    place = np.empty_like(token)
    place[token] = np.arange(len(token))
    return [token, place]


def _positions(size: int, n: int, remote: bool) -> list[IndexTable]:
    """Positions along an axis, windows x tokens, in the order of `_sizes`."""
    sizes = _sizes(size, n)
    if remote:
        parts = np.split(np.arange(n), np.cumsum([windows for windows, _ in sizes])[:-1])
        return [part[:, None] + n * np.arange(tokens) for part, (_, tokens) in zip(parts, sizes, strict=True)]
    parts = np.split(np.arange(size), np.cumsum([windows * tokens for windows, tokens in sizes])[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, sizes, strict=True)]
