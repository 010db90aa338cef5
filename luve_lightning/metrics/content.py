"""What a cascade's final video keeps of its motion video, and what it completes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from luve_lightning.functional.patches import PatchPlan
from luve_lightning.functional.pixels import described
from luve_lightning.functional.spectra import between_grids, cosine_coefficients, luma_of
from luve_lightning.metrics.base import VideoMetric

# The mean square of rounding to 256 levels: nothing in an 8-bit video is known better.
_ROUNDING = 1 / (12 * 255**2)


class MotionMetric(VideoMetric):
    """A measure that compares a video with its motion video, the smaller one that the first stage made.

    `score` takes the motion video's frames as `reference`: as many, and no larger. A subclass defines `compare`.

    Args:
        frames: frames measured per video, the middles of equal parts.
    """

    def __init__(self, frames: int = 16) -> None:
        super().__init__()
        if frames < 1:
            raise ValueError(f"frames: expected at least 1, got {frames}")
        self.frames = frames

    def measure(self, frames: Tensor, reference: Tensor | None) -> float:
        """One video's value; `reference` is its motion video."""
        if reference is None:
            raise ValueError(f"{self.name}: compares with the motion video, and none was given")
        if reference.dtype != torch.uint8 or reference.ndim != 4 or reference.shape[-1] != 3:
            raise ValueError(f"{self.name}: the motion video must be uint8 T x H x W x 3, got {described(reference)}")
        (count, height, width), (own, rows, columns) = frames.shape[:3], reference.shape[:3]
        if own != count or rows > height or columns > width:
            raise ValueError(
                f"{self.name}: the motion video must have the video's frames and be no larger, got {own} frames of "
                f"{rows}x{columns} for {count} of {height}x{width}"
            )
        chosen = PatchPlan(size=1, frames=self.frames).frame_indices(len(frames))
        return self.compare(frames, reference, chosen)

    def compare(self, frames: Tensor, motion: Tensor, chosen: tuple[int, ...]) -> float:
        """`score` for checked frames, of some of them."""
        raise NotImplementedError


class ContentKept(MotionMetric):
    """How much of the motion video's content the final video keeps, in [0, 1].

    Luma of both, by its cosine transform (DCT-II): the final video's first h x w coefficients, scaled to the motion
    video's size, are what a video of that size shows of it. Over the octaves below half of the motion video's Nyquist
    (the octave above is where filters that resample differ), each rectangle of coefficients without the next smaller
    one, down to 4 rows or columns, where the last is whole but for the mean brightness:

        kept = mean over octaves of max(0, 1 - sum |final - motion|^2 / (sum |motion|^2 + rounding)).

    1 for the motion video itself, upsampled by any common filter, and for the true video that it was made from; 0 for
    another scene. Each octave counts the same, so it sees more than large areas of brightness. Noise and changed
    contrast lower it. By itself it rewards doing nothing: read it beside `content_completed`.

    Args:
        frames: frames measured per video, the middles of equal parts.
    """

    name = "content_kept"
    resolution = "half of the motion video's"

    def compare(self, frames: Tensor, motion: Tensor, chosen: tuple[int, ...]) -> float:
        """See the class."""
        height, width = motion.shape[1:3]
        if min(height, width) < 4:
            raise ValueError(
                f"{self.name}: a motion video of {height}x{width} has no octave to compare, 4x4 is the least"
            )
        energy = torch.zeros(height, width, dtype=torch.float64, device=self.device)
        error = torch.zeros_like(energy)
        scale = math.sqrt(height * width / (frames.shape[1] * frames.shape[2]))
        for index in chosen:
            wanted, found = (
                cosine_coefficients(luma_of(video[index].to(self.device)))[:height, :width].double()
                for video in (motion, frames)
            )
            energy += wanted.square()
            error += (found * scale - wanted).square()
        energy, error = energy / len(chosen), error / len(chosen)
        shares = [
            1 - error[inside].sum() / (energy[inside].sum() + _ROUNDING * inside.sum())
            for inside in _octaves(height, width, self.device)
        ]
        return float(torch.stack(shares).clamp(min=0).mean())


def _octaves(height: int, width: int, device: torch.device) -> list[Tensor]:
    """Masks of coefficients, the finest first; the last is everything below but the mean."""

    def within(octave: int) -> Tensor:
        inside = torch.zeros(height, width, dtype=torch.bool, device=device)
        inside[: max(1, height >> octave), : max(1, width >> octave)] = True
        return inside

    octave, masks = 1, []
    while min(height, width) >> octave >= 4:
        masks.append(within(octave) & ~within(octave + 1))
        octave += 1
    last = within(octave)
    last[0, 0] = False
    return [*masks, last]


class ContentCompleted(MotionMetric):
    """How much detail the final video has that its motion video cannot hold, as far as it goes with structure.

    Luma of the final video is split by cosines: detail is what a grid of the motion video's size cannot hold, and
    structure the octave below. Their mean squares A and S in blocks of 8 x 8 pixels of the motion video (all blocks of
    some frames) follow A = c + s S, fitted by least squares with the weights (1 - 10 k)+ / (S + mean S)^2, where k is
    the share of a block's pixels with a channel at 0 or 255, which hide noise. Then

        completed = max(0, s) / log2(video's side / motion video's side).

    Noise is as strong where there is no structure: it raises c and leaves s. The number is the power of detail per
    octave relative to the octave below: about 1 where power falls as 1 / frequency^2, 0.1 to 0.6 in footage, below 0.1
    after common enlarging filters, 0 for a flat video. Neither more nor less is better by itself: enlarged blocks and
    halos at edges have 1 and more, and another scene's detail counts like this one's, so compare with the value of
    true videos, and read it beside `content_kept`.

    Args:
        frames: frames measured per video, the middles of equal parts.
    """

    name = "content_completed"
    higher_is_better = None
    resolution = "native"
    block = 8

    def compare(self, frames: Tensor, motion: Tensor, chosen: tuple[int, ...]) -> float:
        """See the class."""
        (height, width), (rows, columns) = frames.shape[1:3], motion.shape[1:3]
        octaves = math.log2(height * width / (rows * columns)) / 2
        if not octaves:
            raise ValueError(
                f"{self.name}: the video is as large as its motion video, {height}x{width}: nothing is beyond"
            )
        blocks = (max(1, rows // self.block), max(1, columns // self.block))
        below = (max(1, rows // 2), max(1, columns // 2))
        means = []
        for index in chosen:
            frame = frames[index].to(self.device)
            luma = luma_of(frame)
            clipped = ((frame == 0) | (frame == 255)).any(-1).float()
            detail = between_grids(luma, (rows, columns)).square()
            structure = between_grids(luma, below, (rows, columns)).square()
            maps = torch.stack([detail, structure, clipped])
            means.append(F.adaptive_avg_pool2d(maps, blocks).flatten(1).double())
        return max(0.0, _slope(*torch.cat(means, 1))) / octaves


def _slope(detail: Tensor, structure: Tensor, clipped: Tensor) -> float:
    """Slope of detail over structure, each of shape (N,), by weighted least squares."""
    weights = (1 - 10 * clipped).clamp(min=0) / (structure + structure.mean() + _ROUNDING).square()
    if not weights.any():
        return 0.0
    weights = weights / weights.sum()
    spread = structure - (weights * structure).sum()
    covariance = (weights * spread * (detail - (weights * detail).sum())).sum()
    return float(covariance / ((weights * spread.square()).sum() + _ROUNDING**2))
