"""Attention to the nearest tiles of the token grid, by FlexAttention or an explicit mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import log, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention as flex_forward
from torch._higher_order_ops.flex_attention import flex_attention_backward as flex_backward
from torch.nn import functional as F

from luve_lightning.functional.frequency import Grid
from luve_lightning.models.attention.sparse import IndexTable, SparseAttention, indices, rows, take

BLOCK = 128
"""Tokens of a block of FlexAttention, its own size."""
_SMALL = 4096  # tokens up to which a mask of all pairs is as quick, and needs no kernel to be compiled
# A transformer meets a few grids, batches and dtypes; Dynamo gives up after 8 and would then compute every pair.
_MAX_COMPILED = 64


@dataclass(frozen=True)
class Tiles(SparseAttention):
    """Attention to the nearest tiles, as in sliding tile attention (arXiv 2502.04507), on a grid of any size.

    The grid is divided into tiles; the last one of an axis may be smaller. A token attends to every token of `reach`
    tiles along each axis: those around its own tile or, near a border, the nearest to it: tile i of n attends to
    tiles clamp(i - reach // 2, 0, n - reach) and the `reach` - 1 after it. An axis of fewer tiles is attended to
    whole.

    Long sequences on a GPU run as FlexAttention over blocks of 128 tokens: tiles of a multiple of 128 tokens waste
    nothing. Everything else runs with an explicit mask, to the same result.

    Args:
        tile: tokens of a tile along T, h, w.
        reach: tiles attended to along T, h, w.
        dense_layers: see SparseAttention.
        dense_above: see SparseAttention.
        linear: see SparseAttention.

    Raises:
        ValueError: for settings outside these.
    """

    tile: Grid
    reach: Grid

    def __post_init__(self) -> None:
        """Check the settings; JSON's lists become tuples."""
        super().__post_init__()
        for name in ("tile", "reach"):
            self._set(name, self._whole_numbers(name, getattr(self, name), 1, 3))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, layer: int) -> Tensor:
        """Attention to the nearest tiles, the same in each layer; see SparseAttention."""
        del layer
        assert query.shape[1] == prod(grid), f"{query.shape[1]} tokens of a grid of {grid}"
        if _by_blocks(query):
            return self._in_blocks(query, key, value, grid)
        (mask,) = indices(tile_mask, query, (*grid, *self.tile, *self.reach))
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    def _in_blocks(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid) -> Tensor:
        """The same by a kernel that skips blocks, with the tokens in the order of tiles."""
        samples = len(query)
        token, slot, has_token, *tables = indices(tile_layout, query, (*grid, *self.tile, *self.reach, samples))
        q, k, v = (
            take(rows(x), token, slot).view(samples, -1, *x.shape[2:]).transpose(1, 2) for x in (query, key, value)
        )
        output = rows(attend_to_blocks(q, k, v, tables).transpose(1, 2))
        return take(output, slot, token, has_token if len(token) > len(slot) else None).view(query.shape)

    def sparse_pairs(self, grid: Grid, layer: int) -> int:
        """Query-key products of one head: over all tiles, their tokens times those in reach."""
        del layer
        pairs = []
        for size, tile, reach in zip(grid, self.tile, self.reach, strict=True):
            tokens = np.bincount(np.arange(size) // tile)
            pairs.append(int(tokens @ _near(len(tokens), reach) @ tokens))
        return prod(pairs)


def _by_blocks(query: Tensor) -> bool:
    """Whether FlexAttention's compiled kernel serves these queries."""
    on_gpu = query.is_cuda or query.is_meta
    return on_gpu and query.dtype != torch.float64 and query.shape[1] > _SMALL and query.shape[-1] >= 16


def _near(tiles: int, reach: int) -> IndexTable:
    """Along an axis: whether tile i (row) attends to tile j."""
    reach = min(reach, tiles)
    first = np.clip(np.arange(tiles) - reach // 2, 0, tiles - reach)[:, None]
    other = np.arange(tiles)
    return (other >= first) & (other < first + reach)


def _tiles(grid: Grid, tile: Grid) -> IndexTable:
    """Tile of each token along each axis: 3 x N."""
    axes = (np.arange(size) // tokens for size, tokens in zip(grid, tile, strict=True))
    return np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1)


def _attends(grid: Grid, tile: Grid, reach: Grid, tiles: IndexTable) -> IndexTable:
    """Whether tile i (row) of `tiles`, 3 x M, attends to tile j."""
    pairs = np.ones((tiles.shape[1],) * 2, dtype=bool)
    for size, tokens, near, index in zip(grid, tile, reach, tiles, strict=True):
        pairs &= _near(-(-size // tokens), near)[index[:, None], index]
    return pairs


def tile_mask(*sizes: int) -> list[IndexTable]:
    """Whether token i (row) attends to token j, from the nine sizes of grid, tile and reach."""
    grid, tile, reach = _grids(sizes)
    return [_attends(grid, tile, reach, _tiles(grid, tile))]


def tile_layout(*sizes_and_samples: int) -> list[IndexTable]:
    """What describes samples in the order of tiles, where each tile fills whole blocks and its tokens come first.

    Args:
        sizes_and_samples: the nine sizes of grid, tile and reach, and the number of samples.

    Returns:
        The token in each slot, where an empty slot repeats its tile's first token; the slot of each token; whether a
        slot has a token of its own; and the tables of the blocks that attend to each other.
    """
    *sizes, samples = sizes_and_samples
    grid, tile, reach = _grids(sizes)
    along = _tiles(grid, tile)
    _, rows_of_tiles, tiles_in_row = (-(-size // tokens) for size, tokens in zip(grid, tile, strict=True))
    number = (along[0] * rows_of_tiles + along[1]) * tiles_in_row + along[2]
    order = number.argsort(kind="stable")  # tokens in the order of tiles
    counts = np.bincount(number)
    starts = counts.cumsum() - counts
    blocks = -(-counts // BLOCK)
    first_slots = (blocks.cumsum() - blocks) * BLOCK
    slot = np.empty_like(order)
    slot[order] = np.arange(len(order)) + (first_slots - starts)[number[order]]
    first_tokens = order[starts].repeat(blocks)  # of each block's tile
    token = first_tokens.repeat(BLOCK)
    token[slot] = np.arange(len(slot))
    has_token = np.zeros(len(token), dtype=bool)
    has_token[slot] = True
    attends = _attends(grid, tile, reach, along[:, first_tokens])
    tables = tables_of(attends, has_token.reshape(-1, BLOCK).sum(1))
    sample = np.arange(samples)[:, None]
    tokens, slots = ((x + sample * len(y)).ravel() for x, y in ((token, slot), (slot, token)))
    return [tokens, slots, np.tile(has_token, samples), *tables]


def _grids(sizes: Sequence[int]) -> tuple[Grid, Grid, Grid]:
    a, b, c, d, e, f, g, h, i = sizes
    return (a, b, c), (d, e, f), (g, h, i)


def tables_of(attends: IndexTable, filled: IndexTable) -> list[IndexTable]:
    """Which blocks attend to each other, as FlexAttention's BlockMask has it.

    Blocks of keys in which every slot has a token are "full"; in the others a mask is computed.

    Args:
        attends: M x M, bool: whether block i attends to block j.
        filled: tokens of each block, 1 to 128; they come first in it.

    Returns:
        `filled`, and four pairs of tables. The first of a pair has a count for each block, the second a row of as
        many numbers of other blocks, padded: for blocks of queries, the blocks of keys that are not full, then those
        that are; for blocks of keys that are not full, then for those that are, the blocks of queries.
    """
    full = filled == BLOCK
    partly, wholly = attends & ~full, attends & full
    kinds = (partly, wholly, partly.T, wholly.T)
    # One width: torch 2.11's kernels step through the tables of full blocks by the other tables' width.
    width = max(1, *(int(pairs.sum(1).max()) for pairs in kinds))
    return [filled.astype(np.int32), *(table for pairs in kinds for table in _listed(pairs, width))]


def _listed(pairs: IndexTable, width: int) -> tuple[IndexTable, IndexTable]:
    """Count and columns of the true entries of each row, with the leading dimensions of a BlockMask."""
    row, column = pairs.nonzero()
    counts = pairs.sum(1)
    columns = np.zeros((len(pairs), width), dtype=np.int32)
    columns[row, np.arange(len(row)) - (counts.cumsum() - counts)[row]] = column
    return counts.astype(np.int32)[None, None], columns[None, None]


def attend_to_blocks(query: Tensor, key: Tensor, value: Tensor, tables: list[Tensor]) -> Tensor:
    """Attention of each block to those that the tables name.

    Args:
        query: B x heads x S x width, S a multiple of 128.
        key: likewise.
        value: likewise.
        tables: see `tables_of`, of S / 128 blocks. Rows of slots without a token come out arbitrary but finite.
    """
    device, dtype = query.device.type, query.dtype
    if not query.is_meta and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    output, _ = block_attention(query.to(dtype), key.to(dtype), value.to(dtype), tables)
    return output


@torch.library.custom_op("luve_lightning::block_attention", mutates_args=())
def block_attention(query: Tensor, key: Tensor, value: Tensor, tables: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The attention, and the binary logarithm of each query's sum of exponentials, which the gradient needs."""
    if query.is_cuda:
        return _compiled(_forward)(query, key, value, tables)
    logits = _logits(query, key, tables)
    logsumexp = logits.logsumexp(-1)
    output = (logits - logsumexp[..., None]).exp() @ value.to(logits.dtype)
    return torch.empty_like(query).copy_(output), logsumexp / log(2)


@torch.library.custom_op("luve_lightning::block_attention_backward", mutates_args=())
def block_attention_backward(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor, gradient: Tensor, tables: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    if query.is_cuda:
        return _compiled(_backward)(query, key, value, output, logsumexp, gradient, tables)
    results = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    query, key, value, output, gradient = (x.to(_exact(x)) for x in (query, key, value, output, gradient))
    weights = (_logits(query, key, tables) - log(2) * logsumexp[..., None]).exp()
    of_logits = weights * (gradient @ value.mT - (gradient * output).sum(-1, keepdim=True)) * query.shape[-1] ** -0.5
    of_query, of_key, of_value = of_logits @ key, of_logits.mT @ query, weights.mT @ gradient
    return results[0].copy_(of_query), results[1].copy_(of_key), results[2].copy_(of_value)


@block_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, tables: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=_exact(query))


@block_attention_backward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor, gradient: Tensor, tables: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, list[Tensor]], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, tables = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.tables = tables


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, list[None]]:
    of_query, of_key, of_value = block_attention_backward(*ctx.saved_tensors, gradient, ctx.tables)
    return of_query, of_key, of_value, [None] * len(ctx.tables)


block_attention.register_autograd(_differentiate, setup_context=_save)

BLOCK_ATTENTION = torch.ops.luve_lightning.block_attention.default
"""The operator, by which selective recomputation knows it."""


@cache
def _compiled(run: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    # Dynamo knows how users call FlexAttention, but not these inner functions; what compiles its graphs does.
    opaque = torch.compiler.allow_in_graph(run)
    compiled = torch.compile(lambda *args: opaque(*args), backend=backend, dynamic=False, fullgraph=True)

    def limited(*args: Any) -> Any:
        limit = torch._dynamo.config.patch(recompile_limit=_MAX_COMPILED, fail_on_recompile_limit_hit=True)
        with limit, torch.autocast("cuda", enabled=False):
            return compiled(*args)

    return limited


# What the kernel computes of each pair: the score as it is, its gradient, and the mask of blocks that are not full.
# Without annotations: as strings, which they are in this file, they break the keys of Inductor's cache.
_SCORE = lambda score, sample, head, query, key: score  # noqa: E731
_SCORE_GRADIENT = lambda score, sample, head, query, key, gradient: [gradient, None, None, None, None]  # noqa: E731
_HAS_TOKEN = lambda sample, head, query, key, filled: key % BLOCK < filled[key // BLOCK]  # noqa: E731


def _forward(query: Tensor, key: Tensor, value: Tensor, tables: list[Tensor]) -> tuple[Tensor, Tensor]:
    blocks, scale, options, buffers = _described(query, tables)
    output, logsumexp, _ = flex_forward(query, key, value, _SCORE, blocks, scale, options, (), buffers)
    return output, logsumexp


def _backward(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor, gradient: Tensor, tables: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    blocks, scale, options, buffers = _described(query, tables)
    of_logsumexp = torch.zeros_like(logsumexp)
    of_score: Any = _SCORE_GRADIENT  # declared as a graph, where a function serves as well
    given = (query, key, value, output, logsumexp, gradient, of_logsumexp)
    of_query, of_key, of_value, _ = flex_backward(*given, _SCORE, of_score, blocks, scale, options, (), buffers)
    return of_query, of_key, of_value


def _described(query: Tensor, tables: list[Tensor]) -> tuple[tuple[Any, ...], float, dict[str, Any], tuple[Tensor]]:
    """FlexAttention's arguments: the tuple of a BlockMask, scale, options of its kernel, what the mask reads."""
    filled, *rest = tables
    length = query.shape[-2]
    options = {
        "BACKEND": "TRITON",
        "PRESCALE_QK": False,
        "ROWS_GUARANTEED_SAFE": False,
        "BLOCKS_ARE_CONTIGUOUS": False,
        "WRITE_DQ": True,
        "OUTPUT_LOGSUMEXP": True,
        "OUTPUT_MAX": False,
    }
    return (length, length, *rest, BLOCK, BLOCK, _HAS_TOKEN), query.shape[-1] ** -0.5, options, (filled,)


def _logits(query: Tensor, key: Tensor, tables: list[Tensor]) -> Tensor:
    """Scaled products of all pairs under the mask that the tables mean, for the plain computation on a CPU."""
    filled, key_counts, keys, full_key_counts, full_keys, *_ = tables
    attended = torch.zeros(len(filled), len(filled), dtype=torch.bool)
    for counts, columns in ((key_counts, keys), (full_key_counts, full_keys)):
        row, place = (torch.arange(columns.shape[-1]) < counts[0, 0, :, None]).nonzero().unbind(1)
        attended[row, columns[0, 0, row, place]] = True
    has_token = torch.arange(BLOCK) < filled[:, None]
    mask = attended.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1) & has_token.flatten()
    exact = _exact(query)
    return (query.to(exact) @ key.to(exact).mT * query.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)


def _exact(x: Tensor) -> torch.dtype:
    """Dtype of the logarithms."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
