"""The views of frames that VBench shows its networks: shrunk without antialiasing, which skips most of a 4K frame.

VBench 0.1.5 (arXiv 2311.17982, its `utils.py`) resizes tensors of 0 .. 255 in float32 with torchvision's
`antialias=False`: bilinear reads 2 x 2, bicubic 4 x 4 source pixels per output pixel, whatever the scale. From
3840x2160 to 512 wide that is 4 of 56 pixels: aliasing enters, most detail does not. Neither rounds nor clamps.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# Frames are converted to floats a few at a time: a 4K frame takes 100 MB.
_CHUNK_VALUES = 2**26


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
        raise ValueError(
            f"frames of {frames.shape[1]}x{frames.shape[2]} cannot be shrunk to {size[0]}x{size[1]}"
        )
    at_once = max(1, _CHUNK_VALUES // frames[0].numel())
    parts = []
    for part in frames.split(at_once):
        values = part.permute(0, 3, 1, 2).float()
        same = size == tuple(values.shape[2:])
        parts.append(values if same else F.interpolate(values, size=size, mode=mode, align_corners=False))
    return torch.cat(parts)
