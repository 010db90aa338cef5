"""Where the positions of an output grid fall on an input grid, per axis.

Both grids cover the same interval; position i of n is the cell [i, i+1)/n with its centre at (i + 0.5)/n (the
convention of `align_corners=False`). Everything here is one-dimensional: a 3-D query is a triple of these.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _check(n_in: int, n_out: int) -> None:
    if n_in < 1 or n_out < 1:
        raise ValueError(f"grid sizes must be at least 1, got {n_in} -> {n_out}")


def nearest_indices(n_in: int, n_out: int, device: torch.device | None = None) -> Tensor:
    """Index of the input cell that holds each output centre.

    Computed in integers, so it is exact for every pair of sizes: floor((2i + 1) * n_in / (2 * n_out)).

    Args:
        n_in: number of input positions, >= 1.
        n_out: number of output positions, >= 1.
        device: device of the indices.

    Returns:
        int64, shape (n_out,), values in [0, n_in).
    """
    _check(n_in, n_out)
    i = torch.arange(n_out, dtype=torch.int64, device=device)
    return (2 * i + 1) * n_in // (2 * n_out)


def relative_offsets(n_in: int, n_out: int, device: torch.device | None = None) -> Tensor:
    """Offset of each output centre from the centre of its nearest input cell, in units of input cells.

    The integer form, ((2i + 1) * n_in - (2k + 1) * n_out) / (2 * n_out), has no cancellation at large sizes.

    Args:
        n_in: number of input positions, >= 1.
        n_out: number of output positions, >= 1.
        device: device of the offsets.

    Returns:
        float32, shape (n_out,), values in [-0.5, 0.5); zero where both grids are the same.
    """
    k = nearest_indices(n_in, n_out, device)
    i = torch.arange(n_out, dtype=torch.int64, device=device)
    return ((2 * i + 1) * n_in - (2 * k + 1) * n_out).to(torch.float32) / (2 * n_out)


def cell_size(n_in: int, n_out: int) -> float:
    """Extent of an output cell in units of input cells: 1 at equal sizes, 0.5 at 2x."""
    _check(n_in, n_out)
    return n_in / n_out
