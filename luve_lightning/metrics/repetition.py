"""Repetition: how much of a video's structure stands in a frame more than once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from luve_lightning.functional.patches import PatchPlan
from luve_lightning.functional.pixels import frames_to_video, resize_video, video_to_frames
from luve_lightning.functional.spectra import between_grids, luma_of
from luve_lightning.metrics.base import VideoMetric

_CELL, _CELLS, _BINS = 8, 4, 8  # SIFT's: 4 x 4 cells of 8 directions; pixels of the frames as they are compared
_PATCH = _CELL * _CELLS
_STRIDE, _QUERIES = 4, 16  # pixels between patches that are looked through, and between those that are looked for
_SURROUND = _PATCH + _CELL  # pixels that a patch depends on: its outer cells reach half a cell beyond it
_FLOOR = (1.5 / 255) ** 2  # mean square slope of rounding and compression
_VALUES_AT_ONCE = 2**23  # similarities
_LEAST = 0.002  # dissimilarity of a patch on average, below which a frame says nothing


class Repetition(VideoMetric):
    """How much of a frame's structure comes again elsewhere in it, in [0, 1]; scaling up makes objects multiply.

    Frames are shrunk to 192 on the shorter side, and their parts slower than a patch taken away. A patch of 32x32 is
    described by SIFT's histograms of signed gradient directions (Lowe 2004): 4 x 4 cells of 8 directions, to length 1;
    similarity is the cosine. For each patch p, f(p) is the greatest similarity to a patch that does not overlap it, and
    b(p) the greatest that this frame gives anyway: to its own neighbours, moved by half a patch to a whole one, or to
    the patches that do not overlap it with light and dark exchanged, which are as many, as smooth and as contrasted.
    Over the patches of some frames,

        repetition = sum w max(0, f - b) / sum (w (1 - b) + 0.002).

    The weight w = l2 / (l1 + (1.5 / 255)^2), of the eigenvalues l1 >= l2 of the mean product of slopes in p, leaves out
    flat and slowly varying content and straight edges, which are like themselves all along. A texture finer than half
    a patch does not repeat here, nor does content without contrast: 0.

    A picture of 2 x 2 or more tiles has 0.9 to 1, a photograph with one object 0.05 to 0.15 and hardly more or less
    when it is blurred, one of many coins 0.8: what repeats in the world repeats here, too, so compare with the
    original's value or with another method's on the same prompts.

    Args:
        frames: frames measured per video, the middles of equal parts.
        side: shorter side to which frames are shrunk; larger ones look for smaller objects. Smaller frames are
            enlarged to it.
    """

    name = "repetition"
    higher_is_better = False
    resolution = "192 on the shorter side"

    def __init__(self, frames: int = 8, side: int = 192) -> None:
        super().__init__()
        if frames < 1:
            raise ValueError(f"frames: expected at least 1, got {frames}")
        if side < 3 * _PATCH:
            raise ValueError(f"side: expected at least {3 * _PATCH} pixels, three patches, got {side}")
        self.frames, self.side = frames, side
        self.resolution = f"{side} on the shorter side"

    def measure(self, frames: Tensor, reference: Tensor | None) -> float:
        """One video's repetition."""
        again = possible = 0.0
        for index in PatchPlan(size=_PATCH, frames=self.frames).frame_indices(len(frames)):
            parts = _repeated(self._shrunk(frames[index : index + 1].to(self.device)))
            again, possible = again + parts[0], possible + parts[1]
        return again / possible

    def _shrunk(self, frame: Tensor) -> Tensor:
        """Luma of one frame, h x w in [0, 1]."""
        height, width = frame.shape[1:3]
        scale = self.side / min(height, width)
        size = (max(self.side, round(height * scale)), max(self.side, round(width * scale)))
        return luma_of(video_to_frames(resize_video(frames_to_video(frame)[None], size))[0])[0]


def _repeated(luma: Tensor) -> tuple[float, float]:
    """Sums over one frame's patches: of w max(0, f - b), and of w (1 - b) + 0.002."""
    height, width = luma.shape
    fine = between_grids(luma, (max(1, round(height / _PATCH)), max(1, round(width / _PATCH))))
    across, down = _slopes(fine)
    histograms = _cells(across, down)
    places = torch.cartesian_prod(*(torch.arange(side, device=luma.device) for side in _patches(histograms)))
    places = places * _STRIDE
    own, exchanged = (_descriptors(h) for h in (histograms, histograms.roll(_BINS // 2, 0)))
    asked = (places % _QUERIES == 0).all(1)
    weights = _corners(across, down, _patches(histograms)).double()
    again = possible = 0.0
    for part in asked.nonzero().flatten().split(max(1, _VALUES_AT_ONCE // len(places))):
        distance = (places[part][:, None] - places).abs().amax(-1)
        beyond = distance >= _PATCH
        beside = (distance >= _PATCH // 2) & ~beyond
        similar = own[part] @ own.T
        found = similar.masked_fill(~beyond, -1).amax(1)
        neighbours = similar.masked_fill(~beside, -1).amax(1)
        chance = (own[part] @ exchanged.T).masked_fill(~beyond, -1).amax(1)
        base = torch.maximum(neighbours, chance)
        again += float((weights[part] * (found - base).clamp(min=0)).sum())
        possible += float((weights[part] * (1 - base) + _LEAST).sum())
    return again, possible


def _slopes(luma: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(luma[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    return (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2, (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2


def _cells(across: Tensor, down: Tensor) -> Tensor:
    """Histograms of directions around every fourth pixel, weighted by steepness, BINS x rows x columns."""
    steep = torch.hypot(across, down)
    angle = torch.atan2(down, across) / (2 * math.pi) * _BINS
    lower = angle.floor()
    part, lower = angle - lower, lower.long() % _BINS
    bins = steep.new_zeros(_BINS, *steep.shape)
    bins.scatter_(0, lower[None], (steep * (1 - part))[None])
    bins.scatter_(0, ((lower + 1) % _BINS)[None], (steep * part)[None])
    # Each pixel is shared by the four nearest cells.
    taps = 1 - torch.arange(0.5 - _CELL, _CELL, device=steep.device).abs() / _CELL
    kernel = taps[:, None] * taps
    return F.conv2d(bins[:, None], (kernel / kernel.sum())[None, None], stride=_STRIDE)[:, 0]


def _patches(histograms: Tensor) -> tuple[int, int]:
    """How many patches of 4 x 4 cells there are, down and across."""
    reach = (_CELLS - 1) * _CELL // _STRIDE
    return histograms.shape[1] - reach, histograms.shape[2] - reach


def _descriptors(histograms: Tensor) -> Tensor:
    """Unit vectors of all patches, N x (CELLS CELLS BINS)."""
    rows, columns = _patches(histograms)
    step = _CELL // _STRIDE
    starts = [(i * step, j * step) for i in range(_CELLS) for j in range(_CELLS)]
    parts = [histograms[:, y : y + rows, x : x + columns].flatten(1) for y, x in starts]
    return F.normalize(torch.cat(parts).T, dim=1)


def _corners(across: Tensor, down: Tensor, patches: tuple[int, int]) -> Tensor:
    """How much each patch varies in both directions, in [0, 1], shape (N,)."""
    products = torch.stack([across * across, down * down, across * down])[None]
    xx, yy, xy = F.avg_pool2d(products, _SURROUND, _STRIDE)[0, :, : patches[0], : patches[1]].flatten(1)
    middle, root = (xx + yy) / 2, torch.hypot((xx - yy) / 2, xy)
    return (middle - root).clamp(min=0) / (middle + root + _FLOOR)
