"""Frames on disk (uint8), video for models (float in [-1, 1]), and the views of frames that VBench's networks see."""

from __future__ import annotations

from itertools import chain
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
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
        raise ValueError(f"frames: expected uint8 [B x] T x H x W x 3, got {described(frames)}")
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
        raise ValueError(f"video: expected floating point [B x] 3 x T x H x W, got {described(video)}")
    if video.isnan().any():
        raise ValueError("video: holds values that are not numbers (NaN)")
    # Always in float32: bfloat16 has 8 bits of precision and would round levels away.
    levels = video.detach().to(torch.float32).add(1).mul_(127.5).round_().clamp_(0, 255)
    return levels.to(torch.uint8).movedim(-4, -1).contiguous()


def described(tensor: Tensor) -> str:
    """Type and shape of a tensor, for a message."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {' x '.join(map(str, tensor.shape)) or 'scalar'}"


# Frames are resampled in float32 a few at a time, so that a 4K clip needs little more than its own memory.
_CHUNK_VALUES = 2**26


def resize_video(video: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample every frame with an antialiased bicubic filter.

    Keys' kernel with a = -0.5, widened when downscaling: Pillow's `BICUBIC`, computed in float32 on values that
    are not rounded to 8 bits. Cell centres align (`align_corners=False`). The filter overshoots at edges, so the
    result is clamped to the range of pixels.

    Args:
        video: B x C x T x H x W in [-1, 1].
        size: output (height, width), each >= 1.

    Returns:
        B x C x T x height x width in [-1, 1], the dtype of the input; the input itself when the size is the
        same.

    Raises:
        ValueError: for another rank or a size below 1.
    """
    if video.ndim != 5:
        raise ValueError(f"video must be B x C x T x H x W, got shape {tuple(video.shape)}")
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size must be (height, width), each at least 1, got {tuple(size)}")
    batch, channels, frames = video.shape[:3]
    if (height, width) == tuple(video.shape[3:]):
        return video
    flat = video.permute(0, 2, 1, 3, 4).flatten(0, 1)
    at_once = max(1, _CHUNK_VALUES // max(1, flat[0].numel()))
    parts = [_resize_frames(part.float(), height, width).to(video.dtype) for part in flat.split(at_once)]
    # What need not be copied is not: fresh memory takes a third of the time on a CPU.
    resized = (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(batch, frames, channels, height, width)
    return resized.permute(0, 2, 1, 3, 4).contiguous()


def _resize_frames(frames: Tensor, height: int, width: int) -> Tensor:
    """N x C x H x W to N x C x height x width, clamped to [-1, 1]."""
    if width == 1 < height:
        # torch 2.12's CPU kernel repeats the first row when the output is one column wide; one row is right.
        return _resize_frames(frames.mT.contiguous(), 1, height).mT
    size = (height, width)
    return F.interpolate(frames, size=size, mode="bicubic", align_corners=False, antialias=True).clamp_(-1, 1)


def center_crop_box(height: int, width: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Largest centred box with the aspect ratio of `size`.

    Args:
        height: height of the frame, at least `size[0]`.
        width: width of the frame, at least `size[1]`.
        size: target (height, width).

    Returns:
        (top, left, box height, box width); the box is at least `size`.

    Raises:
        ValueError: when the frame is smaller than `size`; upscaled pixels are no high-resolution target.
    """
    target_height, target_width = size
    if min(target_height, target_width) < 1 or height < target_height or width < target_width:
        raise ValueError(f"frames are {height}x{width}, expected at least {target_height}x{target_width}")
    if height * target_width > width * target_height:
        box_height, box_width = max(target_height, round(width * target_height / target_width)), width
    else:
        box_height, box_width = height, max(target_width, round(height * target_width / target_height))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def crop_frames(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut frames to the aspect ratio of `size` around their centre, see `center_crop_box`.

    Args:
        frames: T x H x W x C.
        size: target (height, width).

    Returns:
        A view, T x H' x W' x C.

    Raises:
        ValueError: when the frames are smaller than `size`.
    """
    top, left, height, width = center_crop_box(frames.shape[1], frames.shape[2], size)
    return frames[:, top : top + height, left : left + width]


def resize_frames(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames as a video of a given size.

    Works one frame at a time: frames on disk can be 8K, and all of them as floats take many GB.

    Args:
        frames: uint8 T x H x W x C.
        size: output (height, width).

    Returns:
        float32 C x T x height x width in [-1, 1].
    """
    videos = (resize_video(frames_to_video(frame).unsqueeze(0), size).squeeze(0) for frame in frames.split(1))
    first = next(videos)
    if len(frames) == 1:
        return first
    resized = first.new_empty(len(first), len(frames), *size)
    for place, video in enumerate(chain([first], videos)):
        resized[:, place : place + 1] = video
    return resized


def fit_frames(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """The pixels from which high-resolution latents are encoded: `crop_frames`, then `resize_frames`.

    Args:
        frames: uint8 T x H x W x C, at least `size`.
        size: output (height, width).

    Returns:
        float32 C x T x height x width in [-1, 1].

    Raises:
        ValueError: when the frames are smaller than `size`.
    """
    return resize_frames(crop_frames(frames, size), size)


def fit_window(frames: Tensor, size: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """A window of `fit_frames`, equal to it up to float32's rounding, without resampling the rest.

    Args:
        frames: uint8 T x H x W x C, at least `size`.
        size: (height, width) of the whole.
        rows: (start, stop) of the window's rows, inside `size`.
        columns: (start, stop) of its columns.

    Returns:
        float32 C x T x rows x columns in [-1, 1].

    Raises:
        ValueError: when the frames are smaller than `size`.
    """
    cropped = crop_frames(frames, size)
    (y, down), (x, across) = (
        _resampling(n, wanted, *window)
        for n, wanted, window in zip(cropped.shape[1:3], size, (rows, columns), strict=True)
    )
    video = frames_to_video(cropped[:, y, x])
    return (down @ video @ across.mT).clamp(-1, 1)


def _resampling(n_in: int, n_out: int, start: int, stop: int) -> tuple[slice, Tensor]:
    """The inputs that some outputs of `resize_video` along an axis depend on, and their weights, outputs x inputs."""
    # The filter is separable and linear, so it shows its weights on the columns of the identity.
    identity = torch.eye(n_in)[None, None]
    every = F.interpolate(identity, size=(n_out, n_in), mode="bicubic", align_corners=False, antialias=True)
    weights = every[0, 0, start:stop]
    used = weights.any(dim=0).nonzero().flatten().tolist()
    inputs = slice(used[0], used[-1] + 1)
    return inputs, weights[:, inputs].contiguous()


# The views below are those that VBench 0.1.5 (arXiv 2311.17982, its `utils.py`) shows its networks: torchvision's
# `antialias=False` on floats of 0 .. 255. Bilinear reads 2 x 2, bicubic 4 x 4 source pixels per output pixel, whatever
# the scale: from 3840x2160 to 512 wide 4 of 56. Aliasing enters, most detail does not. Neither rounds nor clamps.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def unit_images(images: Tensor) -> Tensor:
    """uint8 T x H x W x 3 to float32 T x 3 x H x W in [0, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255


def normalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(images - mean) / std for each channel.

    Args:
        images: float N x 3 x H x W in [0, 1].
        mean: means of red, green and blue.
        std: standard deviations of red, green and blue.
    """
    shape = (1, 3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def shorter_side(height: int, width: int, to: int) -> tuple[int, int]:
    """The size whose shorter side is `to`, the longer one rounded down, as in torchvision's `Resize(to)`."""
    return (to, int(to * width / height)) if height <= width else (int(to * height / width), to)


def dino_view(frames: Tensor, to: int = 224) -> Tensor:
    """VBench's view for DINO: the shorter side scaled bilinearly to 224, nothing cropped, ImageNet's colours.

    Args:
        frames: uint8 T x H x W x 3.
        to: length of the shorter side.

    Returns:
        float32 T x 3 x h x w.
    """
    resized = _resize(frames, shorter_side(frames.shape[1], frames.shape[2], to), "bilinear")
    return normalised(resized / 255, IMAGENET_MEAN, IMAGENET_STD)


def clip_view(frames: Tensor, to: int = 224) -> Tensor:
    """VBench's view for CLIP: the shorter side scaled bicubically to 224, cropped to the central square.

    Args:
        frames: uint8 T x H x W x 3.
        to: side of the square.

    Returns:
        float32 T x 3 x to x to, CLIP's colours.
    """
    resized = _resize(frames, shorter_side(frames.shape[1], frames.shape[2], to), "bicubic")
    top, left = (round((side - to) / 2) for side in resized.shape[2:])
    square = resized[:, :, top : top + to, left : left + to]
    return normalised(square / 255, CLIP_MEAN, CLIP_STD)


def longer_side_view(frames: Tensor, to: int = 512) -> Tensor:
    """VBench's view for MUSIQ: the longer side scaled bilinearly to at most 512.

    Args:
        frames: uint8 T x H x W x 3.
        to: length of the longer side; smaller frames are not enlarged.

    Returns:
        float32 T x 3 x h x w in [0, 1].
    """
    height, width = frames.shape[1:3]
    scale = min(1.0, to / max(height, width))
    return _resize(frames, (int(scale * height), int(scale * width)), "bilinear") / 255


def _resize(frames: Tensor, size: tuple[int, int], mode: Literal["bilinear", "bicubic"]) -> Tensor:
    """uint8 T x H x W x 3 to float32 T x 3 x h x w in 0 .. 255, or beyond where bicubic overshoots."""
    if min(size) < 1:
        raise ValueError(f"frames of {frames.shape[1]}x{frames.shape[2]} cannot be shrunk to {size[0]}x{size[1]}")
    at_once = max(1, _CHUNK_VALUES // frames[0].numel())
    parts = []
    for part in frames.split(at_once):
        values = part.permute(0, 3, 1, 2).float()
        same = size == tuple(values.shape[2:])
        parts.append(values if same else F.interpolate(values, size=size, mode=mode, align_corners=False))
    return torch.cat(parts)
