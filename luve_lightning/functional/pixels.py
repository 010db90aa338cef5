"""Conversion between frames on disk (uint8) and video for models (float in [-1, 1])."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def frames_to_video(frames: NDArray[np.uint8] | Tensor) -> Tensor:
    """Video from frames: v = frame / 127.5 - 1.

    Args:
        frames: uint8, shape T x H x W x 3, or B x T x H x W x 3.

    Returns:
        float32 in [-1, 1], shape 3 x T x H x W, or B x 3 x T x H x W, contiguous, on the device of `frames`.
    """
    if isinstance(frames, np.ndarray):
        # torch has no read-only tensors, and no negative strides, which flipped frames have.
        frames = torch.from_numpy(np.require(frames, requirements=["C", "W"]))
    if frames.dtype != torch.uint8 or frames.ndim not in (4, 5) or frames.shape[-1] != 3:
        raise ValueError(f"frames: expected uint8 [B x] T x H x W x 3, got {_described(frames)}")
    return frames.movedim(-1, -4).contiguous().to(torch.float32).div_(127.5).sub_(1)


def video_to_frames(video: Tensor) -> Tensor:
    """Frames from video: the nearest of 256 levels, values beyond [-1, 1] clamped.

    The inverse of `frames_to_video`, exactly, for each of the 256 levels.

    Args:
        video: floating point of any precision, shape 3 x T x H x W, or B x 3 x T x H x W.

    Returns:
        uint8, shape T x H x W x 3, or B x T x H x W x 3, contiguous, on the device of `video`.

    Raises:
        ValueError: another shape or type, or a value that is not a number.
    """
    if not video.is_floating_point() or video.ndim not in (4, 5) or video.shape[-4] != 3:
        raise ValueError(f"video: expected floating point [B x] 3 x T x H x W, got {_described(video)}")
    if video.isnan().any():
        raise ValueError("video: holds values that are not numbers (NaN)")
    # Always in float32: bfloat16 has 8 bits of precision and would round levels away.
    levels = video.detach().to(torch.float32).add(1).mul_(127.5).round_().clamp_(0, 255)
    return levels.to(torch.uint8).movedim(-4, -1).contiguous()


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {' x '.join(map(str, tensor.shape)) or 'scalar'}"
