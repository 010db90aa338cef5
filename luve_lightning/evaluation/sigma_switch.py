"""The noise level to change experts at that denoising spectra suggest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from luve_lightning.evaluation.bootstrap import draw_counts, percentiles
from luve_lightning.evaluation.denoising_spectra import DenoisingSpectra

PAPER_SIGMA_SWITCH = 0.875
"""Where the released LuVe checkpoints change from the low- to the high-frequency expert: t_switch 5/12 at shift 5."""


@dataclass(frozen=True)
class SwitchSuggestion:
    """A noise level to change from the low- to the high-frequency expert at.

    Attributes:
        sigma: from here on the lowest band stays settled to `share` or more, in the mean over the videos.
        sigma_low: lower end of its 95 % bootstrap interval over videos; NaN for a single one.
        sigma_high: upper end.
        share: what counts as settled.
        low: share of the lowest band resolved there.
        high: share of the highest band resolved there.
        separated: whether the highest band is settled to less than `share` there: only then does the switch tell them
            apart.
    """

    sigma: float
    sigma_low: float
    sigma_high: float
    share: float
    low: float
    high: float
    separated: bool


def suggest_switch(
    spectra: DenoisingSpectra, share: float = 0.5, seed: int = 0, replicates: int = 1000
) -> SwitchSuggestion:
    """The noise level at which the lowest band has settled and the highest has not.

    The paper fixes its switch (sigma 0.875) and names an adaptive one as future work; this is our reading of its
    figure. A band is *settled* to (resolved - first) / (1 - first), first being what was resolved at the first step: a
    model that sees nothing but noise there knows it from the caption, and no switch can change that. The default share:
    of Gaussian latents, for which the ideal prediction is known, a band of signal power S under noise power N resolves
    to S / (S + N), so one half is where its signal rises above the noise. Shares near 1 are reached by all bands
    together, at the end of sampling.

    Args:
        spectra: of at least two bands, recorded from pure noise on.
        share: in (0, 1).
        seed: of the bootstrap.
        replicates: how often the videos are drawn anew.

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
    """The noise level from which on a band stays settled to a share or more, linearly between the steps."""
    wanted = resolved[0] + share * (1 - resolved[0])
    below = np.flatnonzero(resolved < wanted)
    if not len(below):
        return sigmas[0]
    last = int(below[-1])  # never the last step, at which all is resolved
    part = (wanted - resolved[last]) / (resolved[last + 1] - resolved[last])
    return float(sigmas[last] + part * (sigmas[last + 1] - sigmas[last]))
