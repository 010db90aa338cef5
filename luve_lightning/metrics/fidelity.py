"""How close a video is to its original: PSNR and SSIM of RGB at native resolution, and measures of its spectrum."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from luve_lightning.functional.fidelity import ssim
from luve_lightning.functional.pixels import unit_images
from luve_lightning.functional.spectra import band_density, band_power, luma_spectrum
from luve_lightning.metrics.base import VideoMetric

# Frames are converted to floats a few at a time: a whole 4K clip would take GBs.
_CHUNK_VALUES = 2**25
# The density of rounding to 256 levels: no band of an 8-bit video is known better, and it keeps a flat one's
# logarithm finite.
_ROUNDING = 1 / (12 * 255**2)


class PsnrRgb(VideoMetric):
    """PSNR of all RGB values of a clip, in dB: 10 log10(255^2 / MSE); infinite for identical clips.

    LuVe (arXiv 2602.11564) gives PSNR_rgb in Table 12 without saying whether it averages over frames or pixels.
    Here the error is averaged over a clip, then the logarithm taken, then averaged over clips.
    """

    name = "psnr_rgb"
    resolution = "native"
    full_reference = True

    def measure(self, frames: Tensor, reference: Tensor | None) -> Tensor:
        """The clip's PSNR."""
        assert reference is not None
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        at_once = max(1, _CHUNK_VALUES // frames[0].numel())
        for parts in zip(frames.split(at_once), reference.split(at_once), strict=True):
            video, target = (part.to(self.device).float() for part in parts)
            total += (video - target).square().sum(dtype=torch.float64)
        return 10 * torch.log10(255**2 * frames.numel() / total)


class Ssim(VideoMetric):
    """SSIM (Wang et al. 2004) of each frame and channel, averaged over a clip; 1 for identical clips.

    Gaussian window of 11 taps and standard deviation 1.5, only where it fits inside the frame.
    """

    name = "ssim"
    resolution = "native"
    full_reference = True

    def measure(self, frames: Tensor, reference: Tensor | None) -> Tensor:
        """The clip's SSIM."""
        assert reference is not None
        at_once = max(1, _CHUNK_VALUES // frames[0].numel())
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for parts in zip(frames.split(at_once), reference.split(at_once), strict=True):
            # SSIM is defined for values from 0 up; around 0 it would compare means differently.
            video, target = (unit_images(part.to(self.device)).transpose(0, 1)[None] for part in parts)
            total += len(parts[0]) * ssim(video, target, black=0, white=1).double().squeeze(0)
        return total / len(frames)


class SpectralDistance(VideoMetric):
    """Mean absolute difference between the log10 power densities of a video and its original.

    Computed on luma in [0, 1]: frames are tapered by a Hann window, averaged over time and then over equally wide
    bands from 0 to Nyquist (the mean brightness is in none, the corners of the spectrum are in the last). The
    density of 8-bit rounding is added to each band. In decades: 0 for equal spectra, 1 when every band has ten
    times too much or too little power. It ignores where things are: shifted frames have the same spectrum.

    Args:
        bands: number of bands; frames need at least twice as many pixels along their longer side.
    """

    name = "spectral_distance"
    higher_is_better = False
    resolution = "native"
    full_reference = True

    def __init__(self, bands: int = 16) -> None:
        super().__init__()
        if bands < 1:
            raise ValueError(f"bands: expected at least 1, got {bands}")
        self.bands = bands

    def measure(self, frames: Tensor, reference: Tensor | None) -> Tensor:
        """One video's distance to its original, in decades."""
        assert reference is not None
        return (self._levels(frames) - self._levels(reference)).abs().mean()

    def _levels(self, frames: Tensor) -> Tensor:
        """log10 density of each band, shape (bands,)."""
        longer = max(frames.shape[1:3])
        if longer < 2 * self.bands:
            raise ValueError(
                f"{self.name}: frames of {frames.shape[1]}x{frames.shape[2]} are too small for {self.bands} bands, "
                f"at most {longer // 2} fit"
            )
        density = band_density(luma_spectrum(frames), np.linspace(0, 1, self.bands + 1).tolist())
        return torch.log10(density + _ROUNDING)


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
        low, high = band_power(luma_spectrum(frames), (0, 0.5, 1)).tolist()
        return high / (low + high) if low + high else 0.0
