"""What goes wrong when a clip is taken: functions that spoil frames by a stated amount.

Every function takes and returns uint8 frames T x H x W x 3 on the CPU, where clips are painted.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from torch import Tensor

from luve_lightning.functional.pixels import frames_to_video, resize_video, video_to_frames
from luve_lightning.functional.unsharp import unsharp_mask


def blurred(frames: Tensor, sigma: float) -> Tensor:
    """Frames out of focus: blurred by a Gaussian of this standard deviation in pixels."""
    return video_to_frames(unsharp_mask(frames_to_video(frames)[None], sigma, -1.0)[0])


def shrunken(frames: Tensor, factor: float) -> Tensor:
    """Frames reduced and enlarged again."""
    height, width = frames.shape[1:3]
    small = resize_video(frames_to_video(frames)[None], (round(height / factor), round(width / factor)))
    return video_to_frames(resize_video(small, (height, width))[0])


def noisy(frames: Tensor, deviation: float, rng: Generator) -> Tensor:
    """Frames with normal noise, its standard deviation `deviation` of 255."""
    return levels(frames + deviation * torch.from_numpy(rng.standard_normal(frames.shape, dtype=np.float32)))


def compressed(frames: Tensor, quality: int) -> Tensor:
    """Frames stored as JPEG of this quality, 1 to 95: at 10 blocks of 8x8 pixels show."""
    stored = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame.numpy()).save(file, "JPEG", quality=quality)
        stored.append(torch.from_numpy(np.array(Image.open(file))))
    return torch.stack(stored)


def exposed(frames: Tensor, gain: float, veil: float = 0.0) -> Tensor:
    """Frames exposed for too short or too long: each level times `gain`, under a veil of light, 0 to 1."""
    return levels(255 * veil + (1 - veil) * gain * frames.float())


def flickering(frames: Tensor, deviation: float, rng: Generator) -> Tensor:
    """Frames each of another brightness, a factor of this standard deviation around 1."""
    factors = 1 + deviation * torch.from_numpy(rng.standard_normal(len(frames), dtype=np.float32))
    return levels(frames * factors.view(-1, 1, 1, 1))


def frozen_from(frames: Tensor, share: float) -> Tensor:
    """Frames the last share of which, 0 to 1, repeat the one before."""
    last = round((len(frames) - 1) * (1 - share))
    return frames[torch.arange(len(frames)).clamp(max=last)]


def stuttering(frames: Tensor, hold: int) -> Tensor:
    """Frames of which each `hold`-th stands until the next one."""
    return frames[torch.arange(len(frames)) // hold * hold]


def shuffled(frames: Tensor, group: int, rng: Generator) -> Tensor:
    """Frames that change places in groups of so many, 2 or more; in pairs all do."""
    order = np.arange(len(frames))
    for start in range(0, len(order), group):
        part = order[start : start + group]
        order[start : start + group] = part[::-1] if group == 2 else rng.permutation(part)
    return frames[torch.from_numpy(order)]


def shaken(frames: Tensor, margin: int, deviation: float, rng: Generator) -> Tensor:
    """Frames of a trembling camera, which has cut `margin` pixels from each side.

    Args:
        frames: uint8 T x H x W x 3.
        margin: how far a frame may be from its place, in pixels.
        deviation: standard deviation of a frame's place, each drawn anew, in pixels.
        rng: the randomness.

    Returns:
        uint8 T x (H - 2 margin) x (W - 2 margin) x 3.
    """
    height, width = (side - 2 * margin for side in frames.shape[1:3])
    steps = (deviation * rng.standard_normal((len(frames), 2))).round().clip(-margin, margin).astype(int) + margin
    parts = [frame[y : y + height, x : x + width] for frame, (y, x) in zip(frames, steps.tolist(), strict=True)]
    return torch.stack(parts)


def levels(values: Tensor) -> Tensor:
    """Values rounded to the 256 levels of a byte."""
    return values.round().clamp(0, 255).to(torch.uint8)
