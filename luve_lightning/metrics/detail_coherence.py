"""Temporal coherence of detail: whether it moves with the scene, or flickers, or sticks to the screen."""

from __future__ import annotations

import torch
from torch import Tensor

from luve_lightning.functional.flow import dense_flow, smoothed, warped
from luve_lightning.functional.patches import PatchPlan
from luve_lightning.functional.spectra import between_grids, luma_of
from luve_lightning.metrics.base import VideoMetric

# The variance of rounding to 256 levels: nothing in an 8-bit video is known better.
_ROUNDING = 1 / (12 * 255**2)
_WINDOW = 4.0  # pixels; standard deviation of the window that judges whether the motion was found


class DetailCoherence(VideoMetric):
    """How much of a video's detail moves along with its structure, in [-1, 1].

    Luma of two successive frames is split by cosines into structure, what a grid of half the size can hold, and detail
    d, the rest. The motion is measured on the structure alone (`dense_flow`: Lucas and Kanade), so that detail cannot
    lead it, and the second frame's detail is fetched back along it, d'. Over some pairs of frames,

        coherence = sum w d d' / sqrt(sum w (d^2 + r) sum w (d'^2 + r)),

    where r is the variance of 8-bit rounding and w = v / (v + 4 e + r), from the local variance v of the structure and
    the local mean square e of its difference along the motion, leaves out what is covered, uncovered or too smooth to
    be followed. It is the share of detail that persists: about 0.9 for true moving detail (interpolation at fractions
    of a pixel takes the rest), 0 for noise that is new in each frame, about 0 for noise that sticks to the screen while
    the scene moves, and 0 for a video without detail. Below 0: aliases that run against the motion, such as the remains
    of a grid after enlarging. In a still scene nothing tells noise that stays from texture: both have 1.

    Args:
        pairs: pairs of frames measured per video, the middles of equal parts.
        cutoff: side of the coarser grid over the frames', in (0, 1); detail is what it cannot hold.
    """

    name = "detail_coherence"
    resolution = "native"
    least_frames = 2

    def __init__(self, pairs: int = 8, cutoff: float = 0.5) -> None:
        super().__init__()
        if pairs < 1:
            raise ValueError(f"pairs: expected at least 1, got {pairs}")
        if not 0 < cutoff < 1:
            raise ValueError(f"cutoff: expected a fraction between 0 and 1, got {cutoff}")
        self.pairs, self.cutoff = pairs, cutoff

    def measure(self, frames: Tensor, reference: Tensor | None) -> float:
        """One video's coherence."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for index in PatchPlan(size=1, frames=self.pairs).frame_indices(len(frames) - 1):
            sums += self._sums(luma_of(frames[index : index + 2].to(self.device)))
        both, first, second = sums.tolist()
        return both / (first * second) ** 0.5 if first * second else 0.0

    def _sums(self, luma: Tensor) -> Tensor:
        """Sums over one pair of frames, 2 x H x W: of w d d', w (d^2 + r) and w (d'^2 + r)."""
        grid = tuple(max(1, int(side * self.cutoff)) for side in luma.shape[1:])
        detail = between_grids(luma, (grid[0], grid[1]))
        structure = luma - detail
        flow = dense_flow(structure[:1], structure[1:], finest=int(self.cutoff <= 0.5))
        weights = _followed(structure[:1, None], warped(structure[1:, None], flow))
        first, second = detail[:1, None], warped(detail[1:, None], flow)
        products = (first * second, first.square() + _ROUNDING, second.square() + _ROUNDING)
        return torch.stack([(weights * product).sum(dtype=torch.float64) for product in products])


def _followed(structure: Tensor, fetched: Tensor) -> Tensor:
    """How surely the motion was found at each pixel, in [0, 1), N x 1 x H x W."""
    variance = smoothed((structure - smoothed(structure, _WINDOW)).square(), _WINDOW)
    error = smoothed((structure - fetched).square(), _WINDOW)
    return variance / (variance + 4 * error + _ROUNDING)
