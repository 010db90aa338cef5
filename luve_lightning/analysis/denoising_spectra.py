"""When bands resolve during denoising, and the noise level for changing experts that follows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luve_lightning.evaluation.bootstrap import draw_counts, percentiles
from luve_lightning.evaluation.tables import Row
from luve_lightning.functional.flow_matching import clean_of_velocity
from luve_lightning.functional.spectra import band_power, radial_spectrum

PAPER_SIGMA_SWITCH = 0.875
"""Where the released LuVe checkpoints change from the low- to the high-frequency expert: t_switch 5/12 at shift 5."""


@dataclass(frozen=True)
class SwitchSuggestion:
    """A noise level at which to change from the low- to the high-frequency expert.

    Attributes:
        sigma: from here on the lowest band stays settled to `share` or more, averaged over the videos.
        sigma_low: lower end of its 95 % bootstrap interval over videos; NaN for a single one.
        sigma_high: upper end.
        share: share that counts as settled.
        low: share of the lowest band resolved there.
        high: share of the highest band resolved there.
        separated: whether the highest band is settled to less than `share` there; only then does the switch
            separate them.
    """

    sigma: float
    sigma_low: float
    sigma_high: float
    share: float
    low: float
    high: float
    separated: bool


def suggest_switch(
    spectra: BandResolution, share: float = 0.5, seed: int = 0, replicates: int = 1000
) -> SwitchSuggestion:
    """The noise level at which the lowest band has settled and the highest has not.

    The paper fixes its switch (sigma 0.875) and names an adaptive one as future work; this is our reading of its
    figure. A band is *settled* to (resolved - first) / (1 - first), where first is the share resolved at the first
    step: a model that sees only noise there knows that much from the caption, and no switch can change it. Reason
    for the default share: for Gaussian latents, whose ideal prediction is known, a band of signal power S under
    noise power N resolves to S / (S + N), so its signal rises above the noise at one half. All bands reach shares
    near 1 together, at the end of sampling.

    Args:
        spectra: at least two bands, recorded from pure noise on.
        share: in (0, 1).
        seed: seed of the bootstrap.
        replicates: number of resamples.

    Raises:
        ValueError: for another share, or a single band.
    """
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number between 0 and 1, got {share}")
    if len(spectra.edges) < 3:
        raise ValueError("edges: a switch lies between the lowest and the highest of at least two bands")
    lowest, highest = (spectra.resolved_each[..., band].numpy() for band in (0, -1))
    videos = spectra.videos
    sigma = _crossing(lowest.mean(0), spectra.sigmas, share)
    means = draw_counts(videos, seed, replicates) @ lowest / videos
    ends = percentiles(np.array([_crossing(mean, spectra.sigmas, share) for mean in means]), videos)
    at = spectra.at(sigma)
    separated = sigma > _crossing(highest.mean(0), spectra.sigmas, share)
    return SwitchSuggestion(sigma, *ends, share, float(at[0]), float(at[-1]), separated)


def _crossing(resolved: NDArray[np.float64], sigmas: Sequence[float], share: float) -> float:
    """The noise level from which on a band stays settled to a share or more, interpolated linearly between steps."""
    wanted = resolved[0] + share * (1 - resolved[0])
    below = np.flatnonzero(resolved < wanted)
    if not len(below):
        return sigmas[0]
    last = int(below[-1])  # never the last step, at which everything is resolved
    part = (wanted - resolved[last]) / (resolved[last + 1] - resolved[last])
    return float(sigmas[last] + part * (sigmas[last + 1] - sigmas[last]))


COLUMNS = ("step", "sigma", "timestep", "band", "resolved", "power")


_EMPTY = 1e-12


class NoSpectrum(ValueError):
    """Raised for generated latents whose bands cannot be compared: not finite, or constant."""


@dataclass(frozen=True)
class CleanPrediction:
    """The model's prediction of the clean latent, at one denoising step.

    Attributes:
        sigma: noise level of the step's input.
        timestep: as given to the transformer.
        latents: B x C x t x h x w, float32 on the CPU.
    """

    sigma: float
    timestep: float
    latents: Tensor


@contextmanager
def recorded_predictions(scheduler: Any) -> Iterator[list[CleanPrediction]]:
    """Record the clean latent that each step of a diffusers scheduler starts from, guidance included.

    Works for any pipeline: callbacks at a step's end do not get the model's prediction, so the scheduler's `step`
    is wrapped; its result is unchanged. Every step keeps a copy of the latents: at 2K (13 x 184 x 320, 16
    channels) 49 MB each.

    Args:
        scheduler: a flow-matching scheduler; restored afterwards.

    Yields:
        A list that grows by one entry per step.

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
        sigma = scheduler.sigmas[scheduler.step_index - 1]  # the index has moved to the next step by now
        clean = clean_of_velocity(sample.float(), model_output.float(), sigma.to(sample.device))
        found.append(CleanPrediction(float(sigma), float(timestep), clean.detach().cpu()))
        return result

    scheduler.step = listening
    try:
        yield found
    finally:
        del scheduler.step  # uncovers the class's own


@dataclass(frozen=True)
class BandResolution:
    """How far each band of V videos has resolved at each of S steps.

    Attributes:
        edges: edges of the bands, rising fractions of Nyquist; see `functional.spectra.band_power`.
        sigmas: S noise levels, falling.
        timesteps: S.
        resolved_each: float64, V x S x bands: squared coherence with the last prediction, in [0, 1]; ends at 1.
        power_each: float64, V x S x bands: power of the prediction over that of the last one.
    """

    edges: tuple[float, ...]
    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    resolved_each: Tensor
    power_each: Tensor

    @property
    def videos(self) -> int:
        """Number of videos."""
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
        """One row per step and band, with the keys COLUMNS; steps count from 0."""
        means = self.resolved.tolist(), self.power.tolist()
        return [
            dict(zip(COLUMNS, (step, sigma, timestep, band, resolved, power), strict=True))
            for step, (sigma, timestep) in enumerate(zip(self.sigmas, self.timesteps, strict=True))
            for band, resolved, power in zip(self.bands, means[0][step], means[1][step], strict=True)
        ]

    def at(self, sigma: float) -> np.ndarray:
        """Share of each band resolved at a noise level, interpolated linearly between steps."""
        levels = np.asarray(self.sigmas)[::-1]
        return np.array([np.interp(sigma, levels, band[::-1]) for band in self.resolved.numpy().T])


def denoising_spectra(predictions: Sequence[CleanPrediction], edges: Sequence[float]) -> BandResolution:
    """Compare each step's prediction with the last one's, band by band.

    Args:
        predictions: predictions of one generation, in order; a batch of B counts as B videos.
        edges: edges of the bands, see `functional.spectra.band_power`.

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
        # The inner product, from the powers of the two and of their difference.
        product = ((own + total - _bands(latents - last, edges)) / 2).clamp(min=0)
        # A band that is empty except for rounding agrees with nothing.
        resolved.append((product.square() / (own * total)).masked_fill(own < _EMPTY * total, 0).clamp(max=1))
        power.append(own / total)
    return BandResolution(
        edges=tuple(edges),
        sigmas=tuple(prediction.sigma for prediction in predictions),
        timesteps=tuple(prediction.timestep for prediction in predictions),
        resolved_each=torch.stack(resolved, 1),
        power_each=torch.stack(power, 1),
    )


def joined(spectra: Sequence[BandResolution]) -> BandResolution:
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
