"""How a clip was taken, whatever it shows: how well, without a reference, and functions that spoil its frames.

Each measure looks where content matters least: focus at the sharpest edges, noise in the smoothest parts, exposure
at the brightest and the darkest pixels. What spoils does so by a stated amount; it takes and returns uint8 frames
T x H x W x 3 on the CPU, where clips are painted.
"""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from luve_lightning.functional.pixels import frames_to_video, resize_video, video_to_frames
from luve_lightning.functional.unsharp import unsharp_mask

_LUMA = (0.299, 0.587, 0.114)
_LOOKED_AT = 5  # frames that single pictures are measured on
_SIDE = 96  # rows and columns at which the camera's movement is found
_COARSE = 16.0  # waves across a frame, to which movement is found: finer ones are lost where the picture turns
_LONGEST = 2**24  # values of which PyTorch finds a quantile
_STANDS = 0.1  # pixels a frame of movement, below which a clip stands still

# A measure's value at which a take is as good as bad, and the distance from it that changes odds by e. Good takes are
# above, except where the distance is negative.
LIMITS: dict[str, tuple[float, float]] = {
    "focus": (0.4, 0.03),
    "noise": (5.5, -0.5),
    "blocks": (0.43, -0.03),
    "bright": (0.5, 0.06),
    "dark": (0.26, -0.03),
    "still": (0.4, -0.08),
    "shake": (0.028, -0.002),
}


def take_measures(frames: Tensor) -> dict[str, float]:
    """Measures of one clip.

    focus: slope of the sharpest edges, as a share of the change over four pixels. noise: Immerkaer's (1996) estimate of
    the standard deviation, of 255, in the smoothest twentieth of 8x8 blocks. blocks: logarithm of the change between
    neighbours across the borders of 8x8 blocks over that elsewhere (as Wang, Sheikh and Bovik 2002, wherever the grid
    is). bright and dark: levels of the brightest and of the darkest 0.5 % of pixels, 0 to 1. still: share of frames
    that repeat the one before. shake: median change of the camera's speed from frame to frame, as a share of the
    frame's side.

    Args:
        frames: uint8 T x H x W x 3, neighbours in time, T >= 3, sides of 32 and more.

    Returns:
        The measures by their names in `LIMITS`. A clip that shows nothing has no focus.

    Raises:
        ValueError: another type or shape, or too few or too small frames.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames: expected uint8 T x H x W x 3, got {frames.dtype} {tuple(frames.shape)}")
    if len(frames) < 3 or min(frames.shape[1:3]) < 32:
        raise ValueError(f"frames: expected 3 or more of 32x32 or larger, got {tuple(frames.shape[:3])}")
    luma = frames.float() @ torch.tensor(_LUMA, device=frames.device) / 255
    chosen = torch.linspace(0, len(frames) - 1, min(_LOOKED_AT, len(frames))).round().long()
    pictures, brightest = luma[chosen], frames[chosen].amax(-1).flatten(1).float() / 255
    return {
        "focus": _focus(pictures),
        "noise": _noise(pictures),
        "blocks": _blocks(pictures),
        "bright": _middle(_quantile(brightest, 0.995)),
        "dark": _middle(_quantile(brightest, 0.005)),
        "still": _still(luma),
        "shake": _shake(luma),
    }


def take_quality(frames: Tensor) -> float:
    """Says how well a clip was taken, 0 to 1: one flaw that shows makes it bad, whatever else is good.

    The product over `LIMITS` of 1 / (1 + exp(-(measure - limit) / distance)).

    Args:
        frames: as in `take_measures`.
    """
    measures = take_measures(frames)
    odds = [(measures[name] - limit) / distance for name, (limit, distance) in LIMITS.items()]
    return math.prod(1 / (1 + math.exp(-min(max(value, -30.0), 30.0))) for value in odds)


def _focus(pictures: Tensor) -> float:
    near, far = (_quantile(_changes(pictures, step), 0.999) for step in (1, 4))
    return _middle(torch.where(far > 2 / 255, near / far.clamp(min=1e-6), far.new_zeros(())))


def _changes(pictures: Tensor, step: int) -> Tensor:
    across = (pictures[:, :, step:] - pictures[:, :, :-step]).abs()
    down = (pictures[:, step:] - pictures[:, :-step]).abs()
    return torch.cat([across.flatten(1), down.flatten(1)], 1)


def _noise(pictures: Tensor) -> float:
    kernel = pictures.new_tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]])
    rough = F.conv2d(pictures[:, None], kernel[None, None]).abs()
    parts = F.avg_pool2d(rough, 8).flatten(1) * (255 * math.sqrt(math.pi / 2) / 6)
    return _middle(_quantile(parts, 0.05))


def _blocks(pictures: Tensor) -> float:
    found = []
    for axis in (1, 2):
        change = pictures.diff(dim=axis).abs().mean(dim=(0, 3 - axis))
        change = change[: len(change) // 8 * 8].view(-1, 8).mean(0)  # by the place in a block
        others = change.sort().values[:-1].median()
        found.append(float(torch.log((change.max() + 1e-4) / (others + 1e-4))))
    return sum(found) / 2


def _still(luma: Tensor) -> float:
    # Change in time over change in space: roughly pixels of movement, so that dark clips are no stiller than others.
    space = luma.diff(dim=1).abs().mean((1, 2)) + luma.diff(dim=2).abs().mean((1, 2))
    moved = luma.diff(dim=0).abs().mean((1, 2)) / (space[1:] / 2).clamp(min=1e-4)
    return float((moved < _STANDS).float().mean())


def _shake(luma: Tensor) -> float:
    small = F.interpolate(luma[:, None], (_SIDE, _SIDE), mode="area")[:, 0]
    edge = torch.hann_window(_SIDE, device=luma.device)
    window = edge[:, None] * edge
    waves = torch.fft.rfft2((small - small.mean((1, 2), keepdim=True)) * window)
    # Phase correlation: the peak is where one frame lies on the next.
    both = waves[1:] * waves[:-1].conj()
    rows = torch.fft.fftfreq(_SIDE, device=luma.device)[:, None] * _SIDE
    columns = torch.fft.rfftfreq(_SIDE, device=luma.device) * _SIDE
    weights = torch.exp(-(rows**2 + columns**2) / (2 * _COARSE**2))
    peaks = torch.fft.irfft2(weights * both / both.abs().clamp(min=1e-6), s=(_SIDE, _SIDE)).flatten(1).argmax(1)
    speed = torch.stack([peaks // _SIDE, peaks % _SIDE], 1)
    speed = torch.where(speed > _SIDE // 2, speed - _SIDE, speed).float() / _SIDE
    return _middle(speed.diff(dim=0).norm(dim=1))


def _quantile(values: Tensor, share: float) -> Tensor:
    """Each row's quantile; of rows too long for PyTorch, as of frames wider than 4K, that of evenly spaced values."""
    return values[:, :: -(-values.shape[1] // _LONGEST)].quantile(share, dim=1)


def _middle(values: Tensor) -> float:
    return float(values.median())


# What goes wrong when a clip is taken -----------------------------------------------------------------------------


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
