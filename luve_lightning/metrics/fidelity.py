"""How close a video is to its original: PSNR and SSIM of RGB at native resolution."""

from __future__ import annotations

import torch
from torch import Tensor

from luve_lightning.functional.fidelity import ssim
from luve_lightning.functional.pixels import unit_images
from luve_lightning.metrics.base import VideoMetric

# Frames are converted to floats a few at a time: a whole 4K clip would take GBs.
_CHUNK_VALUES = 2**25


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
