"""Bands of noise levels, in which an expert is trained and used, and what a level's loss weighs in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from torch import Tensor

from luve_lightning.functional.flow_matching import (
    index_fraction_of_sigma,
    shift_sigma,
    sigma_of_index_fraction,
    timestep_of_sigma,
)

Density = Callable[[Tensor], Tensor]
"""From index fractions, float64 (n,), to relative densities >= 0, (n,); constant is uniform in the index."""

_BINS = 1000  # number of places at which a weighting is evaluated in its band


@dataclass(frozen=True)
class SigmaBand:
    """The noise levels low <= sigma < high; a band up to 1 includes 1. Numbers, too, are compared in float32.

    Attributes:
        low: shifted sigma, >= 0.
        high: shifted sigma, <= 1.

    Example:
        >>> low_frequency = SigmaBand.from_index_fractions(0, 5 / 12, shift=5.0)
        >>> low_frequency.low, low_frequency.contains(0.9)
        (0.875, True)
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not (self.low >= 0 and self.high <= 1 and np.float32(self.low) < np.float32(self.high)):
            raise ValueError(f"a band of sigmas needs 0 <= low < high <= 1, got [{self.low}, {self.high})")

    @classmethod
    def from_index_fractions(cls, start: float, stop: float, shift: float) -> SigmaBand:
        """The band between two places in the schedule, 0 <= start < stop <= 1, 0 = most noise.

        Bands that share a place share the exact bound, a float32. LuVe's low-frequency expert is (0, 5/12) at
        shift 5, its high-frequency expert (5/12, 1).
        """
        low, high = (float(np.float32(sigma_of_index_fraction(place, shift))) for place in (stop, start))
        return cls(low, high)

    def index_fractions(self, shift: float) -> tuple[float, float]:
        """(start, stop) of the band in the schedule; the inverse of `from_index_fractions`."""
        return index_fraction_of_sigma(self.high, shift), index_fraction_of_sigma(self.low, shift)

    @overload
    def contains(self, sigma: float) -> bool: ...
    @overload
    def contains(self, sigma: Tensor) -> Tensor: ...
    def contains(self, sigma: float | Tensor) -> bool | Tensor:
        """Whether sigma is in the band: a bool for a number, bools of the same shape for a tensor.

        Raises:
            ValueError: for 16-bit tensors, where rounding moves sigmas near a bound across it.
        """
        low, high = float(np.float32(self.low)), float(np.float32(self.high))
        if not isinstance(sigma, Tensor):
            rounded = float(np.float32(sigma))
            return low <= rounded and (rounded < high or rounded == high == 1)
        if sigma.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"sigma is {sigma.dtype}: choose the band before the cast, in float32, or samples change bands"
            )
        sigma = sigma.float()
        return (low <= sigma) & (sigma <= high if high == 1 else sigma < high)

    def sample(
        self,
        count: int,
        shift: float,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        weighting: Density | None = None,
    ) -> Tensor:
        """Draw sigmas uniformly in the index of the continuous schedule, or with a density over it.

        Args:
            count: how many.
            shift: shift of the schedule.
            generator: used on its own device; draws `count` numbers whatever the weighting.
            device: device of the result; default the generator's.
            weighting: relative density over the index fraction; None is uniform.

        Returns:
            float32, shape (count,), all in the band.
        """
        u = torch.rand(count, generator=generator, dtype=torch.float64, device=generator.device)
        sigma = self._at(u if weighting is None else self._quantile(u, shift, weighting), shift)
        return sigma if device is None else sigma.to(device)

    def levels(self, count: int, shift: float) -> Tensor:
        """The middles of `count` equal parts of the band's index range, for losses without randomness.

        Returns:
            float32, shape (count,), decreasing.
        """
        return self._at((torch.arange(count, dtype=torch.float64) + 0.5) / count, shift)

    def _at(self, part: Tensor, shift: float) -> Tensor:
        """Float32 sigmas at fractions of the band's index range, 0 = most noise."""
        start, stop = self.index_fractions(shift)
        sigma = sigma_of_index_fraction(start + part * (stop - start), shift).float()
        low, high = np.float32(self.low), np.float32(self.high)
        # Rounding must not lift a sigma to the upper bound, which belongs to the next band.
        return sigma.clamp(float(low), 1.0 if high == 1 else float(np.nextafter(high, np.float32(0))))

    def _quantile(self, u: Tensor, shift: float, weighting: Density) -> Tensor:
        """Fractions of the band's index range below which the weighting's density has shares `u`."""
        start, stop = self.index_fractions(shift)
        middles = (torch.arange(_BINS, dtype=torch.float64, device=u.device) + 0.5) / _BINS
        density = weighting(start + middles * (stop - start)).to(u)
        if density.shape != middles.shape or not (density.isfinite().all() and (density >= 0).all()):
            raise ValueError(f"{weighting} must give one finite density >= 0 for each index fraction")
        total = density.sum()
        if total <= 0:
            raise ValueError(f"{weighting} is zero in the whole band [{self.low}, {self.high})")
        above = (density / total).cumsum(0)
        # side="right" skips bins of density zero, also at u = 0.
        index = torch.searchsorted(above, u, right=True).clamp(max=int(density.nonzero().max()))
        below = above[index] - density[index] / total
        return ((index + (u - below).clamp(min=0) * total / density[index]) / _BINS).clamp(0, 1)


class Weighting:
    """A `Density` that a configuration names by its import path."""

    def __call__(self, fraction: Tensor) -> Tensor:
        """Density at index fractions, float64 (n,), not normalised."""
        raise NotImplementedError(f"{type(self).__name__} weights nothing")


@dataclass(frozen=True)
class LogitNormalWeighting(Weighting):
    """A weighting that prefers the middle of the schedule: logit(unshifted sigma) ~ N(mean, std).

    As in Stable Diffusion 3 (arXiv 2403.03206, section 3.1). LuVe draws uniformly.
    """

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, fraction: Tensor) -> Tensor:
        """Density at index fractions, not normalised."""
        sigma = (1 - fraction).clamp(1e-12, 1 - 1e-12)  # 0 / 0 at 0 and 1
        density = torch.exp(-((torch.logit(sigma) - self.mean) ** 2) / (2 * self.std**2))
        return density / (sigma * (1 - sigma))


class LossWeight:
    """The factor of a sample's loss at its noise level, which a configuration names by its import path.

    A `Weighting` changes which levels are drawn, this one how much they count.
    """

    def __call__(self, sigma: Tensor, shift: float) -> Tensor:
        """Factors >= 0 at sigmas of a schedule with this shift, the shape and device of `sigma`, float32."""
        raise NotImplementedError(f"{type(self).__name__} weighs nothing")


@dataclass(frozen=True)
class UniformLossWeight(LossWeight):
    """Every level counts 1: flow matching's own loss, and all that LuVe's paper (arXiv 2602.11564) says."""

    def __call__(self, sigma: Tensor, shift: float) -> Tensor:
        """Ones."""
        del shift
        return torch.ones_like(sigma, dtype=torch.float32)


@dataclass(frozen=True)
class BellLossWeight(LossWeight):
    """Levels around timestep 500 count most, pure noise nothing: the loss weight of DiffSynth-Studio's trainers.

    With x the timesteps of the `steps` steps of the schedule and y(x) = exp(-2 ((x - steps / 2) / steps)^2), a
    level counts (y - min y) * steps / sum(y - min y). The mean over the whole schedule is 1. At shift 5 it is 0.34 in
    the band of LuVe's low-frequency expert and 1.47 in that of its high-frequency expert; timesteps from 975 up carry
    6 % of the first one's loss instead of 27 %. DiffSynth-Studio trains at the schedule's own timesteps; between
    them, and below the least, the formula goes on.

    Attributes:
        steps: steps of the schedule, and the timestep of sigma 1.
    """

    steps: int = 1000

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps: expected at least 2, got {self.steps}")

    def __call__(self, sigma: Tensor, shift: float) -> Tensor:
        """Factors at sigmas, computed in float64."""
        unshifted = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)[:-1]
        heights = self._height(shift_sigma(unshifted, shift))
        lowest = float(heights.min())  # pure noise's, and the least of all levels: no factor is negative
        factor = self.steps / float((heights - lowest).sum())
        return ((self._height(sigma.double()) - lowest) * factor).float()

    def _height(self, sigma: Tensor) -> Tensor:
        timestep = timestep_of_sigma(sigma, self.steps)
        return torch.exp(-2 * ((timestep - self.steps / 2) / self.steps) ** 2)
