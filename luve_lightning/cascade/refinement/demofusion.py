"""DemoFusion: overlapping crops of the trained size, held together by the upsampled video and by dilated samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from luve_lightning.cascade.refinement.progressive import UNIT, ProgressiveRefinement, grid_of
from luve_lightning.cascade.run import RefinementRun, Run
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.functional.noise_bands import noised

if TYPE_CHECKING:
    from luve_lightning.cascade.options import CascadeOptions
    from luve_lightning.cascade.pipeline import LuVePipeline

Corner = tuple[int, int]


@dataclass(frozen=True)
class DemoFusionRefinement(ProgressiveRefinement):
    """DemoFusion (arXiv 2311.16973) for flow matching and video latents.

    A level's latents z are the ones before, upsampled. Let x be the noisy latents at sigma, and c = (1 + cos(pi (1 -
    sigma))) / 2, which falls from 1 to 0. Each step

    - mixes x with z noised to the same level by the same noise (skip residual), with the weight c1 = c ** cosine_1:
      (1 - c1) x + c1 ((1 - sigma) z + sigma noise);
    - predicts local velocities, of overlapping crops of the first stage's size whose places jitter at random, and takes
      their mean where they overlap (MultiDiffusion, arXiv 2302.08113);
    - predicts global velocities, of every d-th row and column of x from each of the d * d first corners (dilated
      sampling), after a Gaussian filter of width 2 d - 1 and deviation sigma_filter * (0.99 c ** cosine_3 + 0.01)
      that keeps the mean and the standard deviation;
    - steps by (1 - c2) local + c2 global, with c2 = c ** cosine_2.

    The paper's cosine runs over t / T of a diffusion; here it runs over sigma, which is close to it at the same
    signal-to-noise ratio (SDXL's t / T of 0.5 has that of sigma 0.62). Its DDIM steps, made for each part, become Euler
    steps (the sampler `euler`), whose mean is the step of the mean velocity; multi-step samplers would undo the skip
    residual. Crops and dilation act in space only, frames stay whole. d is the growth of an axis, rounded, so any ratio
    will do. Crops at the border stay there, and latents are repeated where rows are missing, instead of the paper's
    zeros. The paper starts at pure noise (`skip_steps: 0`) and upsamples bicubically (`upsampling: bicubic`).

    Attributes:
        overlap: share of a crop's side that the next one shares, in [0, 1).
        cosine_1: exponent of the skip residual.
        cosine_2: exponent of dilated sampling.
        cosine_3: exponent of the filter.
        sigma_filter: standard deviation of the filter at the first step, in latents.
    """

    between: str = "bicubic"
    overlap: float = 0.5
    cosine_1: float = 3.0
    cosine_2: float = 1.0
    cosine_3: float = 1.0
    sigma_filter: float = 0.8

    no_cache: ClassVar[str] = "demofusion: a cache between steps would mix its crops: expected --speed.cache null"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap: expected a number in [0, 1), got {self.overlap}")
        for name in ("cosine_1", "cosine_2", "cosine_3", "sigma_filter"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)}")

    def level(self, given: RefinementRun, native: Size3d) -> Tensor:
        """See ProgressiveRefinement."""
        given = replace(given, run=replace(given.run, schedule=given.run.schedule.sampled_by("euler")))
        z, size = given.latents, grid_of(given.latents)
        x, noise = given.renoised()
        window, dilation = self._window(native, size), dilation_of(native, size)
        places = _drawn(given.run)

        def before_step(x: Tensor, step: int, sigma: float) -> Tensor:
            del step
            c1 = cosine(sigma) ** self.cosine_1
            return (1 - c1) * x + c1 * noised(z, noise, torch.tensor(sigma, device=z.device))

        def predict(velocity: Callable[[Tensor], Tensor], x: Tensor, sigma: float) -> Tensor:
            c2 = cosine(sigma) ** self.cosine_2
            local = mean_of_crops(velocity, x, window, list(self._corners(native, size, places)))
            deviation = self.sigma_filter * (0.99 * cosine(sigma) ** self.cosine_3 + 0.01)
            smooth = filtered(x, dilation, deviation)
            return (1 - c2) * local + c2 * dilated(velocity, smooth, dilation)

        return given.denoised(x, given.skip, before_step=before_step, predict=predict)

    def passes(self, native: Size3d, size: Size3d) -> list[tuple[Size3d, int]]:
        """See ProgressiveRefinement."""
        window, dilation = self._window(native, size), dilation_of(native, size)
        crops = len(list(self._corners(native, size, None)))
        padded = [(n + -n % (d * UNIT)) // d for n, d in zip(size[1:], dilation, strict=True)]
        return [((size[0], *window), crops), ((size[0], padded[0], padded[1]), math.prod(dilation))]

    def check(self, pipeline: LuVePipeline, options: CascadeOptions) -> None:
        """Refuse what depends on steps that see the whole latents, and sizes; see ProgressiveRefinement.

        Raises:
            ValueError: in one line.
        """
        super().check(pipeline, options)
        if pipeline.refinement_transformer.is_cache_enabled:
            raise ValueError(self.no_cache)
        pipeline.schedule(options.shift, "euler")

    def _window(self, native: Size3d, size: Size3d) -> Corner:
        """Height and width of the crops: the first stage's, where the latents are no smaller."""
        return min(native[1], size[1]), min(native[2], size[2])

    def _corners(self, native: Size3d, size: Size3d, places: torch.Generator | None) -> Iterator[Corner]:
        """Upper left corners of crops that cover the latents; without a generator they do not jitter."""
        axes = list(zip(size[1:], self._window(native, size), strict=True))
        starts = [crop_starts(n, window, self.overlap) for n, window in axes]
        for row in starts[0]:
            for column in starts[1]:
                jittered = [
                    _jittered(start, n, window, self.overlap, places)
                    for start, (n, window) in zip((row, column), axes, strict=True)
                ]
                yield jittered[0], jittered[1]


def cosine(sigma: float) -> float:
    """The weight that falls from 1 at sigma 1 to 0 at sigma 0 along a cosine."""
    return (1 + math.cos(math.pi * (1 - sigma))) / 2


def dilation_of(native: Size3d, size: Size3d) -> Corner:
    """How many times an axis has grown, to the nearest whole number."""
    rows, columns = (max(1, round(n / before)) for n, before in zip(size[1:], native[1:], strict=True))
    return rows, columns


def crop_starts(length: int, window: int, overlap: float) -> list[int]:
    """First places of the fewest crops that cover an axis with at least this overlap; the last ends where it does."""
    stride = _stride(window, overlap)
    return [min(i * stride, length - window) for i in range(math.ceil((length - window) / stride) + 1)]


def mean_of_crops(velocity: Callable[[Tensor], Tensor], x: Tensor, window: Corner, corners: list[Corner]) -> Tensor:
    """Velocities of crops of the last two axes, averaged where they overlap; the corners' crops must cover `x`."""
    total, count = torch.zeros_like(x), torch.zeros_like(x[:1, :1, :1])
    for row, column in corners:
        place = (..., slice(row, row + window[0]), slice(column, column + window[1]))
        total[place] += velocity(x[place])
        count[place] += 1
    return total / count


def dilated(velocity: Callable[[Tensor], Tensor], x: Tensor, dilation: Corner) -> Tensor:
    """Velocities of every d-th row and column, put back in place; the last rows are repeated to whole tokens."""
    height, width = x.shape[-2:]
    missing = -height % (dilation[0] * UNIT), -width % (dilation[1] * UNIT)
    padded = F.pad(x, (0, missing[1], 0, missing[0], 0, 0), mode="replicate")
    found = torch.empty_like(padded)
    for row in range(dilation[0]):
        for column in range(dilation[1]):
            place = (..., slice(row, None, dilation[0]), slice(column, None, dilation[1]))
            found[place] = velocity(padded[place].contiguous())
    return found[..., :height, :width]


def filtered(x: Tensor, dilation: Corner, deviation: float) -> Tensor:
    """Latents after a Gaussian filter in space, with the mean and standard deviation that each sample had."""
    smooth = x.flatten(0, 2)[:, None]
    for axis, d in ((2, dilation[0]), (3, dilation[1])):
        if d > 1:
            distance = torch.arange(1 - d, d, device=x.device, dtype=x.dtype)
            kernel = (-(distance**2) / (2 * deviation**2)).exp()
            shape = [1, 1, 1, 1]
            shape[axis] = len(kernel)
            margins = (0, 0, d - 1, d - 1) if axis == 2 else (d - 1, d - 1, 0, 0)
            smooth = F.conv2d(F.pad(smooth, margins, mode="replicate"), (kernel / kernel.sum()).view(shape))
    smooth = smooth.view_as(x)
    axes = (1, 2, 3, 4)
    if dilation == (1, 1):
        return smooth
    scale = x.std(axes, keepdim=True) / smooth.std(axes, keepdim=True)
    return (smooth - smooth.mean(axes, keepdim=True)) * scale + x.mean(axes, keepdim=True)


def _stride(window: int, overlap: float) -> int:
    return max(1, round(window * (1 - overlap)))


def _jittered(start: int, length: int, window: int, overlap: float, places: torch.Generator | None) -> int:
    """A crop's first place, moved by at most a quarter of what two crops share; crops at the border stay."""
    reach = (window - _stride(window, overlap)) // 4
    if places is None or reach == 0 or start in (0, length - window):
        return start
    moved = start + int(torch.randint(-reach, reach + 1, (), generator=places))
    return min(max(moved, 0), length - window)


def _drawn(run: Run) -> torch.Generator:
    """A generator of the crops' places, which follows from the run's own."""
    given = run.options.get("generator")
    source = given[0] if isinstance(given, list) else given
    device = "cpu" if source is None else source.device
    seed = torch.randint(2**31, (), generator=source, device=device)
    return torch.Generator("cpu").manual_seed(int(seed))


METHODS = {"demofusion": DemoFusionRefinement}
