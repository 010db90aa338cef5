"""Temporal coherence of detail: whether it moves with the scene, or flickers, or sticks to the screen.

The motion is Lucas and Kanade's flow between pictures, from coarse to fine.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from luve_lightning.functional.patches import PatchPlan
from luve_lightning.functional.pixels import described
from luve_lightning.functional.spectra import between_grids, luma_of
from luve_lightning.metrics.base import VideoMetric

# The variance of rounding to 256 levels: nothing in an 8-bit video is known better, and below it there is no structure
# to follow.
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


def dense_flow(
    first: Tensor, second: Tensor, window: float = 3.0, iterations: int = 3, smallest: int = 12, finest: int = 0
) -> Tensor:
    """How far each point of one picture has moved in another: first(x) = second(x + flow(x)).

    Lucas and Kanade (1981) as Bouguet's pyramid (2000): the least squares of the linearised difference in a
    Gaussian window, repeated at each octave from the coarsest on. Where a window has no structure in a direction,
    the coarser octave's flow stays.

    Args:
        first: floating point N x H x W, brightness in [0, 1].
        second: the same shape.
        window: standard deviation of the window in pixels of each octave.
        iterations: solutions per octave.
        smallest: pixels of the shorter side below which no coarser octave is made. The largest motion that can be
            followed is some pixels of the coarsest.
        finest: octaves left out at the fine end: 1 for pictures that a grid of half their size can hold, a quarter of
            the work.

    Returns:
        float32 N x 2 x H x W, pixels to the right and down.

    Raises:
        ValueError: other shapes or types.
    """
    if first.shape != second.shape or first.ndim != 3 or not first.is_floating_point():
        raise ValueError(
            f"flow: expected two floating point N x H x W of one shape, got {described(first)} and {described(second)}"
        )
    octaves = [(first.float()[:, None], second.float()[:, None])]
    while min(octaves[-1][0].shape[-2:]) >= 2 * smallest:
        octaves.append(tuple(_halved(picture) for picture in octaves[-1]))  # type: ignore[arg-type]
    flow = first.new_zeros(len(first), 2, *octaves[-1][0].shape[-2:], dtype=torch.float32)
    for earlier, later in reversed(octaves[min(finest, len(octaves) - 1) :]):
        flow = _enlarged(flow, earlier.shape[-2:])
        for _ in range(iterations):
            flow = flow + _step(earlier, warped(later, flow), window)
    return _enlarged(flow, first.shape[-2:])


def warped(pictures: Tensor, flow: Tensor) -> Tensor:
    """Pictures fetched from where a flow leads, with bicubic interpolation; beyond a border, its own pixels.

    Args:
        pictures: float N x C x H x W.
        flow: N x 2 x H x W, pixels to the right and down.

    Returns:
        N x C x H x W: the pictures at x + flow(x).
    """
    height, width = pictures.shape[-2:]
    y = torch.arange(height, device=flow.device, dtype=flow.dtype)[:, None]
    x = torch.arange(width, device=flow.device, dtype=flow.dtype)
    places = torch.stack([(2 * (x + flow[:, 0]) + 1) / width - 1, (2 * (y + flow[:, 1]) + 1) / height - 1], -1)
    return F.grid_sample(pictures, places, mode="bicubic", padding_mode="border", align_corners=False)


def smoothed(maps: Tensor, sigma: float) -> Tensor:
    """Maps N x C x H x W averaged in a Gaussian window; at the borders, of what is inside."""
    radius = math.ceil(2.5 * sigma)
    taps = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-taps.square() / (2 * sigma**2))
    for axis in (-2, -1):
        shape = [1, 1, 1, 1]
        shape[axis] = len(taps)
        pad = (radius, radius, 0, 0) if axis == -1 else (0, 0, radius, radius)
        length = maps.shape[axis]
        there = F.conv1d(maps.new_ones(1, 1, length), kernel.view(1, 1, -1), padding=radius)[0, 0]
        there = there.view(-1, 1) if axis == -2 else there
        flat = F.pad(maps.flatten(0, 1)[:, None], pad)
        maps = F.conv2d(flat, kernel.view(shape)).view(maps.shape) / there
    return maps


def _step(first: Tensor, second: Tensor, window: float) -> Tensor:
    """The flow from `first` to a nearly equal `second`, N x 2 x H x W, at most one pixel."""
    right, down = _slopes((first + second) / 2)
    left_over = second - first
    products = [right * right, right * down, down * down, right * left_over, down * left_over]
    xx, xy, yy, xt, yt = smoothed(torch.cat(products, 1), window).split(1, 1)
    xx, yy = xx + _ROUNDING, yy + _ROUNDING
    determinant = xx * yy - xy * xy
    step = torch.cat([xy * yt - yy * xt, xy * xt - xx * yt], 1) / determinant
    return step.clamp(-1, 1)


def _slopes(pictures: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(pictures, (1, 1, 1, 1), mode="replicate")
    return ((padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2, (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2)


def _halved(pictures: Tensor) -> Tensor:
    size = [(side + 1) // 2 for side in pictures.shape[-2:]]
    return F.interpolate(pictures, size=size, mode="bilinear", align_corners=False, antialias=True)


def _enlarged(flow: Tensor, size: torch.Size) -> Tensor:
    if flow.shape[-2:] == size:
        return flow
    factors = [size[1] / flow.shape[-1], size[0] / flow.shape[-2]]
    larger = F.interpolate(flow, size=size, mode="bilinear", align_corners=False)
    return larger * larger.new_tensor(factors).view(1, 2, 1, 1)
