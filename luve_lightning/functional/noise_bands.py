"""Noise levels: flow matching as Wan trains and samples it, an expert's band, what a level weighs in training.

    x_sigma = (1 - sigma) * x0 + sigma * noise        velocity = noise - x0        timestep = 1000 * sigma

Four numbers name one noise level, and mixing them up gives a model that trains on the wrong noise:

- the *unshifted* sigma s, in which schedules are evenly spaced;
- *sigma*, always the shifted one here: sigma = shift * s / (1 + (shift - 1) * s);
- the *timestep* that the transformer receives, 1000 * sigma;
- the *index fraction* 1 - s, the place in the schedule, where 0 is the most noise. LuVe (arXiv 2602.11564) gives
  its t_switch = 0.417 as one: 5/12 at shift 5 is sigma 0.875, timestep 875.

What converts them takes a number or a tensor and returns the same kind. Numbers are checked; tensors are not, because
that would wait for the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, overload

import numpy as np
import torch
from torch import Tensor

FloatOrTensor = TypeVar("FloatOrTensor", float, Tensor)


def shift_sigma(sigma: FloatOrTensor, shift: float) -> FloatOrTensor:
    """Shift an unshifted sigma towards more noise (shift > 1): shift * s / (1 + (shift - 1) * s).

    Args:
        sigma: unshifted, in [0, 1].
        shift: greater than 0; 1 changes nothing, Wan uses 5 at 720p and 3 at 480p.

    Example:
        >>> shift_sigma(7 / 12, shift=5.0)  # LuVe's t_switch, 5/12 of the schedule
        0.875
    """
    _check(sigma, shift)
    # Equal to the formula above, but never above 1 by rounding.
    return sigma / (sigma + (1 - sigma) / shift)


def unshift_sigma(sigma: FloatOrTensor, shift: float) -> FloatOrTensor:
    """The inverse of `shift_sigma`."""
    _check(sigma, shift)
    return sigma / (sigma + (1 - sigma) * shift)


def sigma_of_index_fraction(fraction: FloatOrTensor, shift: float) -> FloatOrTensor:
    """Sigma at a place in the schedule: 0 is its start (sigma 1), 1 its end (sigma 0)."""
    _check(fraction, shift, "index fraction")
    return shift_sigma(1 - fraction, shift)


def index_fraction_of_sigma(sigma: FloatOrTensor, shift: float) -> FloatOrTensor:
    """The inverse of `sigma_of_index_fraction`."""
    return 1 - unshift_sigma(sigma, shift)


def timestep_of_sigma(sigma: FloatOrTensor, train_timesteps: int = 1000) -> FloatOrTensor:
    """The timestep that the transformer receives; not rounded (a sampler with UniPC rounds it down)."""
    _check(sigma)
    return train_timesteps * sigma


def sigma_of_timestep(timestep: FloatOrTensor, train_timesteps: int = 1000) -> FloatOrTensor:
    """The inverse of `timestep_of_sigma`; integer tensors give float32."""
    if isinstance(timestep, Tensor) and not timestep.is_floating_point():
        timestep = timestep.float()  # torch would use the default dtype, which is bfloat16 under `precision: bf16-true`
    sigma = timestep / train_timesteps
    _check(sigma)
    return sigma


def noised(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) * x0 + sigma * noise.

    Args:
        x0: clean samples, B x ...
        noise: standard normal, same shape as `x0`.
        sigma: shape (B,) or a scalar, in [0, 1], at least float32.

    Returns:
        The shape and dtype of `x0`, computed in the wider dtype of the three.
    """
    sigma = _per_sample(sigma, x0)
    return ((1 - sigma) * x0 + sigma * noise).to(x0.dtype)


def noise_augmented(latents: Tensor, noise: Tensor, strength: Tensor) -> Tensor:
    """sqrt(1 - s^2) * latents + s * noise: noise of standard deviation s that keeps the variance of unit latents.

    What diffusion models before flow matching call step n of their schedule, with s^2 = 1 - alpha_bar(n).

    Args:
        latents: B x ...
        noise: standard normal, same shape.
        strength: s, shape (B,) or a scalar, in [0, 1], at least float32.

    Returns:
        The shape and dtype of `latents`, computed in the wider dtype of the three.
    """
    strength = _per_sample(strength, latents)
    return ((1 - strength.square()).sqrt() * latents + strength * noise).to(latents.dtype)


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """The transformer's target at every sigma: noise - x0."""
    return noise - x0


def clean_of_velocity(x_sigma: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """The clean sample that a velocity points to: x_sigma - sigma * v; arguments as for `noised`."""
    return (x_sigma - _per_sample(sigma, x_sigma) * v).to(x_sigma.dtype)


def _check(value: float | Tensor, shift: float = 1.0, name: str = "sigma") -> None:
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift must be a number greater than 0, got {shift}")
    if not isinstance(value, Tensor) and not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def _per_sample(sigma: Tensor, samples: Tensor) -> Tensor:
    if sigma.ndim == 0:
        return sigma
    if sigma.shape != samples.shape[:1]:
        raise ValueError(f"sigma must have one value per sample, ({samples.shape[0]},), got {tuple(sigma.shape)}")
    return sigma.view(-1, *[1] * (samples.ndim - 1))


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
