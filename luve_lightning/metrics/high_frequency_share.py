"""The share of a video's contrast that is fine detail."""

from __future__ import annotations

from torch import Tensor

from luve_lightning.functional.spectra import band_power, luma_spectrum
from luve_lightning.metrics.base import VideoMetric


class HighFrequencyShare(VideoMetric):
    """Share of luma's power at spatial frequencies above half of Nyquist, in [0, 1].

    Frames are tapered by a Hann window and averaged over time. The mean brightness does not count, the corners of
    the spectrum do. White noise has 0.8, a sharp photograph some hundredths, a blurred one some thousandths, a
    video without contrast 0. Neither more nor less is better: noise, ringing and block edges raise it as detail
    does.
    """

    name = "high_frequency_share"
    higher_is_better = None
    resolution = "native"

    def measure(self, frames: Tensor, reference: Tensor | None) -> float:
        """Share of one video."""
        del reference
        low, high = band_power(luma_spectrum(frames), (0, 0.5, 1)).tolist()
        return high / (low + high) if low + high else 0.0
