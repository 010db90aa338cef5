"""Where the positions of an output grid fall on an input grid, per axis.

Both grids cover the same interval; position i of n is the cell [i, i+1)/n with its centre at (i + 0.5)/n (the
convention of `align_corners=False`). Everything here is one-dimensional: a 3-D query is a triple of these.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


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


def take_sorted(x: Tensor, axis: int, index: Tensor, most: int) -> Tensor:
    """`x.index_select(axis, index)` for indices that never decrease, whose gradient is summed in order.

    That of `index_select` adds up with atomic operations on a GPU, which is slow and differs from run to run.

    Args:
        x: any tensor.
        axis: of `x`, not negative.
        index: int64, each at least as large as the one before.
        most: how often one index may occur at most.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x.index_select(axis, index)
    taken: Tensor = _TakeSorted.apply(x, axis, index, most)
    return taken


class _TakeSorted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int, index: Tensor, most: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.axis, ctx.count, ctx.most = axis, x.shape[axis], most
        return x.index_select(axis, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (index,) = ctx.saved_tensors
        positions = torch.arange(ctx.count, device=index.device)
        start, stop = (torch.searchsorted(index, positions, right=right) for right in (False, True))
        shape = [-1 if axis == ctx.axis else 1 for axis in range(gradient.ndim)]
        total: Tensor | None = None
        for number in range(ctx.most):
            place = start + number
            used = (place < stop).to(gradient.dtype).view(shape)
            part = gradient.index_select(ctx.axis, place.clamp(max=len(index) - 1))
            total = part.mul_(used) if total is None else total.addcmul_(part, used)
        assert total is not None
        return total, None, None, None


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


InterpolationMode = Literal["nearest", "bilinear", "bicubic"]
Size3d = tuple[int, int, int]


def check_size(size: Size3d) -> Size3d:
    """Refuse an output size that is not three positive integers, naming what is wrong."""
    if len(size) != 3 or any(int(n) != n or n < 1 for n in size):
        raise ValueError(f"size must be (frames, height, width), each an integer >= 1, got {tuple(size)}")
    return int(size[0]), int(size[1]), int(size[2])


def interpolate_latents(latents: Tensor, size: Size3d, mode: InterpolationMode = "bilinear") -> Tensor:
    """Resample latents to any size.

    Cell centres align (`align_corners=False`). Time is sampled linearly ("bilinear", "bicubic") or by the nearest
    frame ("nearest"); an unchanged axis is left exactly as it was.

    Args:
        latents: B x C x T x h x w.
        size: output frames, height, width, each >= 1.
        mode: "nearest", "bilinear" (linear along each axis) or "bicubic" (cubic in space, linear in time).

    Returns:
        B x C x size, the dtype of the input.

    Raises:
        ValueError: for a size below 1 or an unknown mode.

    Example:
        >>> interpolate_latents(torch.ones(1, 16, 3, 4, 5), (3, 7, 10)).shape
        torch.Size([1, 16, 3, 7, 10])
    """
    if latents.ndim != 5:
        raise ValueError(f"latents must be B x C x T x h x w, got shape {tuple(latents.shape)}")
    frames, height, width = check_size(size)
    if mode == "nearest":
        for axis, n_out in zip((2, 3, 4), (frames, height, width), strict=True):
            n_in = latents.shape[axis]
            index = nearest_indices(n_in, n_out, latents.device)
            latents = take_sorted(latents, axis, index, most=-(-n_out // n_in))
        return latents
    if mode == "bilinear":
        return F.interpolate(latents, size=(frames, height, width), mode="trilinear", align_corners=False)
    if mode == "bicubic":
        batch, t = latents.shape[0], latents.shape[2]
        # bicubic in bfloat16 exists on CUDA only; float32 is exact for both.
        flat = latents.float().permute(0, 2, 1, 3, 4).flatten(0, 1)
        flat = F.interpolate(flat, size=(height, width), mode="bicubic", align_corners=False)
        out = flat.unflatten(0, (batch, t)).permute(0, 2, 1, 3, 4)
        if t != frames:
            out = F.interpolate(out, size=(frames, height, width), mode="trilinear", align_corners=False)
        return out.to(latents.dtype).contiguous(memory_format=torch.contiguous_format)
    raise ValueError(f"unknown interpolation mode {mode!r}, expected one of {', '.join(get_args(InterpolationMode))}")
