"""Interpolation of latents: the VLUer's baselines, and the residual it adds to."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from luve_lightning.functional.coordinates import nearest_indices

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
    """
    if latents.ndim != 5:
        raise ValueError(f"latents must be B x C x T x h x w, got shape {tuple(latents.shape)}")
    frames, height, width = check_size(size)
    if mode == "nearest":
        for axis, n_out in zip((2, 3, 4), (frames, height, width), strict=True):
            index = nearest_indices(latents.shape[axis], n_out, latents.device)
            latents = latents.index_select(axis, index)
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
    raise ValueError(
        f"unknown interpolation mode {mode!r}, expected one of {', '.join(get_args(InterpolationMode))}"
    )
