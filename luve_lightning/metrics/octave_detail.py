"""Detail by band: the power of one octave against the original's."""

from __future__ import annotations

import torch
from torch import Tensor

from luve_lightning.functional.spectra import band_density, luma_spectrum
from luve_lightning.metrics.base import VideoMetric

# The density of rounding to 256 levels: no band of an 8-bit video is known better, and it keeps a flat one's
# logarithm finite.
_ROUNDING = 1 / (12 * 255**2)


class OctaveDetail(VideoMetric):
    """How much more power than its original a video has in one octave of spatial frequencies, in decades.

    log10 (p + r) / (q + r), where p and q are the mean power densities of luma in [0, 1] over the frequencies from
    2^-octave to 2^(1-octave) of Nyquist (frames tapered by a Hann window, averaged over time; the first octave includes
    the corners of the spectrum) and r is the density of 8-bit rounding. 0 as in the original, 1 for ten times its
    power, -1 for a tenth: detail is missing. Nearer to 0 is better, so neither direction is: noise and halos raise it
    as detail does. `spectral_distance` sums up all frequencies without their sign.

    Args:
        octave: 1 is the finest, the upper half of frequencies, where twofold upsampling has nothing to start from;
            2 is the next.
    """

    higher_is_better = None
    resolution = "native"
    full_reference = True

    def __init__(self, octave: int = 1) -> None:
        super().__init__()
        if octave < 1:
            raise ValueError(f"octave: expected at least 1, the finest, got {octave}")
        self.octave = octave
        self.name = f"detail_octave_{octave}"

    def measure(self, frames: Tensor, reference: Tensor | None) -> Tensor:
        """One video's excess, in decades; negative where detail is missing."""
        assert reference is not None
        return self._level(frames) - self._level(reference)

    def _level(self, frames: Tensor) -> Tensor:
        longer = max(frames.shape[1:3])
        if longer < 2**self.octave:
            raise ValueError(
                f"{self.name}: frames of {frames.shape[1]}x{frames.shape[2]} have no such octave, the last is "
                f"{longer.bit_length() - 1}"
            )
        density = band_density(luma_spectrum(frames), (2.0**-self.octave, 2.0 ** (1 - self.octave)))
        return torch.log10(density[0] + _ROUNDING)
