"""Which spatial frequencies of the clean latent are settled at which noise level (LuVe, arXiv 2602.11564, figure 6).

At each denoising step the model's velocity points to a clean latent, x0_k = x_k - sigma_k * v_k. The last step's is
what the sampler returns. A band of spatial frequencies has *resolved* at step k to their squared coherence

    max(0, <x0_k, x0_last>)^2 / (|x0_k|^2 |x0_last|^2),

the products summed over the band's frequencies, channels and latent frames: the share of the final band's power that
the prediction explains, up to one factor for its strength. 0 when nothing of the band is there yet, 1 when all is where
it will stay. Power in the wrong places counts for nothing, which a comparison of two spectra would miss; and too much
or too little power in the right places does no harm: classifier-free guidance gives early predictions several times the
final power, and an average over what may still come has less than it. That ratio is the column `power`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luve_lightning.evaluation.tables import Row
from luve_lightning.functional.flow_matching import clean_of_velocity
from luve_lightning.functional.spectra import band_power, radial_spectrum

COLUMNS = ("step", "sigma", "timestep", "band", "resolved", "power")


_EMPTY = 1e-12


class NoSpectrum(ValueError):
    """Generated latents whose bands cannot be compared: not finite, or constant."""


@dataclass(frozen=True)
class CleanPrediction:
    """What the model expects the clean latent to be, at one denoising step.

    Attributes:
        sigma: noise level of the step's input.
        timestep: as the transformer was given it.
        latents: B x C x t x h x w, float32 on the CPU.
    """

    sigma: float
    timestep: float
    latents: Tensor


@contextmanager
def recorded_predictions(scheduler: Any) -> Iterator[list[CleanPrediction]]:
    """Record the clean latent that each step of a diffusers scheduler starts from, guidance included.

    For any pipeline: a callback at a step's end is not given the model's prediction, so the scheduler's `step` is
    listened to. What it returns stays as it is. Every step keeps a copy of the latents: at 2K (13 x 184 x 320, 16
    channels) 49 MB each.

    Args:
        scheduler: a flow-matching scheduler; afterwards it is as it was.

    Yields:
        A list that grows by one entry a step.

    Raises:
        ValueError: when the scheduler's model does not predict velocities.
    """
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if kind != "flow_prediction" or not hasattr(scheduler, "sigmas"):
        raise ValueError(f"{type(scheduler).__name__} is for {kind}, expected a flow-matching scheduler")
    found: list[CleanPrediction] = []
    step = scheduler.step

    def listening(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = step(model_output, timestep, sample, *args, **kwargs)
        sigma = scheduler.sigmas[scheduler.step_index - 1]  # the index is that of the next step by now
        clean = clean_of_velocity(sample.float(), model_output.float(), sigma.to(sample.device))
        found.append(CleanPrediction(float(sigma), float(timestep), clean.detach().cpu()))
        return result

    scheduler.step = listening
    try:
        yield found
    finally:
        del scheduler.step  # the class's own is behind it


@dataclass(frozen=True)
class DenoisingSpectra:
    """How far each band of V videos has resolved at each of S steps.

    Attributes:
        edges: of the bands, rising fractions of Nyquist; see `functional.spectra.band_power`.
        sigmas: S noise levels, falling.
        timesteps: S.
        resolved_each: float64, V x S x bands: squared coherence with the last prediction, in [0, 1]; ends in 1.
        power_each: float64, V x S x bands: power of the prediction over that of the last one.
    """

    edges: tuple[float, ...]
    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    resolved_each: Tensor
    power_each: Tensor

    @property
    def videos(self) -> int:
        """How many."""
        return len(self.resolved_each)

    @property
    def resolved(self) -> Tensor:
        """Mean over the videos, S x bands; each counts the same, whatever its contrast."""
        return self.resolved_each.mean(0)

    @property
    def power(self) -> Tensor:
        """Mean over the videos, S x bands."""
        return self.power_each.mean(0)

    @property
    def bands(self) -> list[str]:
        """Names of the bands, such as "0-0.25" for up to a quarter of Nyquist."""
        return [f"{low:g}-{high:g}" for low, high in pairwise(self.edges)]

    def rows(self) -> list[Row]:
        """One row a step and band, with the keys COLUMNS; steps are counted from 0."""
        means = self.resolved.tolist(), self.power.tolist()
        return [
            dict(zip(COLUMNS, (step, sigma, timestep, band, resolved, power), strict=True))
            for step, (sigma, timestep) in enumerate(zip(self.sigmas, self.timesteps, strict=True))
            for band, resolved, power in zip(self.bands, means[0][step], means[1][step], strict=True)
        ]

    def at(self, sigma: float) -> np.ndarray:
        """Share resolved of each band at a noise level, linearly between the steps."""
        levels = np.asarray(self.sigmas)[::-1]
        return np.array([np.interp(sigma, levels, band[::-1]) for band in self.resolved.numpy().T])


def denoising_spectra(predictions: Sequence[CleanPrediction], edges: Sequence[float]) -> DenoisingSpectra:
    """Compare each step's prediction with the last one's, band by band.

    Args:
        predictions: of one generation, in order; a batch of B counts as B videos.
        edges: of the bands, see `functional.spectra.band_power`.

    Raises:
        ValueError: without predictions, or for bands that the latents are too small for.
        NoSpectrum: when a prediction is not finite or a band of the last one has no power.
    """
    if not predictions:
        raise ValueError("no denoising step was recorded")
    last = predictions[-1].latents.double()
    total = _bands(last, edges)
    if not all(bool(prediction.latents.isfinite().all()) for prediction in predictions):
        raise NoSpectrum(
            "the generated latents are not finite: the model has diverged, or overflows in its precision"
        )
    if not bool((total > 0).all()):
        raise NoSpectrum("the generated latents have no power in one of the bands")
    resolved, power = [], []
    for prediction in predictions:
        latents = prediction.latents.double()
        own = _bands(latents, edges)
        # The inner product by the powers of the two and of their difference.
        product = ((own + total - _bands(latents - last, edges)) / 2).clamp(min=0)
        # A band that is empty but for rounding agrees with nothing.
        resolved.append((product.square() / (own * total)).masked_fill(own < _EMPTY * total, 0).clamp(max=1))
        power.append(own / total)
    return DenoisingSpectra(
        edges=tuple(edges),
        sigmas=tuple(prediction.sigma for prediction in predictions),
        timesteps=tuple(prediction.timestep for prediction in predictions),
        resolved_each=torch.stack(resolved, 1),
        power_each=torch.stack(power, 1),
    )


def joined(spectra: Sequence[DenoisingSpectra]) -> DenoisingSpectra:
    """The videos of several generations with the same steps and bands.

    Raises:
        ValueError: when their steps or bands differ, or without any.
    """
    if len({(s.edges, s.sigmas) for s in spectra}) != 1:
        raise ValueError("only generations with the same noise levels and bands can be put together")
    return replace(
        spectra[0],
        resolved_each=torch.cat([s.resolved_each for s in spectra]),
        power_each=torch.cat([s.power_each for s in spectra]),
    )


def _bands(latents: Tensor, edges: Sequence[float]) -> Tensor:
    """Power of each video in each band, B x bands."""
    return band_power(radial_spectrum(latents), edges).mean(1)
