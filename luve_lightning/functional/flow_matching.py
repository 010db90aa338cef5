"""Flow matching as Wan trains and samples it.

    x_sigma = (1 - sigma) * x0 + sigma * noise        velocity = noise - x0        timestep = 1000 * sigma

Four numbers name one noise level, and mixing them up gives a model that trains on the wrong noise:

- the *unshifted* sigma s, in which schedules are evenly spaced;
- *sigma*, always the shifted one here: sigma = shift * s / (1 + (shift - 1) * s);
- the *timestep* that the transformer receives, 1000 * sigma;
- the *index fraction* 1 - s, the place in the schedule, where 0 is the most noise. LuVe (arXiv 2602.11564) gives
  its t_switch = 0.417 as one: 5/12 at shift 5 is sigma 0.875, timestep 875.

Every function takes a number or a tensor and returns the same kind. Numbers are checked; tensors are not, because
that would wait for the GPU.
"""

from __future__ import annotations

import math
from typing import TypeVar

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
