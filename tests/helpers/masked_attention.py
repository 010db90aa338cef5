"""Attention under an explicit mask, written plainly, to compare sparse attentions with."""

from __future__ import annotations

import torch
from torch import Tensor

from luve_lightning.functional.frequency import Grid
from luve_lightning.models.attention import Attention, Where


def drawn(grid: Grid, batch: int = 3, heads: int = 2, width: int = 4) -> list[Tensor]:
    """Queries, keys and values of a grid, in float64, which require gradients."""
    generator = torch.Generator().manual_seed(sum(grid))
    shape = (batch, grid[0] * grid[1] * grid[2], heads, width)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


def positions(grid: Grid) -> list[tuple[int, int, int]]:
    """Frame, row and column of each token."""
    frames, rows, columns = grid
    return [(t, y, x) for t in range(frames) for y in range(rows) for x in range(columns)]


def under_mask(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention in which token i attends to token j where `mask[i, j]`."""
    scores = torch.einsum("bnhc,bmhc->bhnm", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("bhnm,bmhc->bnhc", scores.masked_fill(~mask, -torch.inf).softmax(-1), value)


def with_gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """An output, and the gradients of a weighted sum of it."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad((output.double() * weights).sum(), inputs)]


def assert_attends(attention: Attention, where: Where, masks: list[Tensor]) -> None:
    """Check forward, gradients and pairs against the mean of the attentions under `masks`."""
    inputs = drawn(where.grid)
    want = torch.stack([under_mask(*inputs, mask) for mask in masks]).mean(0)
    got = attention(*inputs, where)
    for ours, reference in zip(with_gradients(got, inputs), with_gradients(want, inputs), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    assert attention.pairs(where.grid, where.layer, 0.5) == sum(int(mask.sum()) for mask in masks)
