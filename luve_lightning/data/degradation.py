"""A worse version of a clip, from which a model learns to make the clip."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from luve_lightning.data.variants import PixelTransform, unsharp_mask
from luve_lightning.functional.pixels import resize_video


class Degraded(PixelTransform):
    """Blur, loss of resolution and noise: one round of Real-ESRGAN's degradation (arXiv 2107.10833).

    FlashVideo (arXiv 2502.05179) and Waver (arXiv 2508.15761) train on low-resolution frames made worse like that,
    because what a first stage generates is worse than a video that is only scaled down. In this order every clip is
    blurred by a Gaussian, reduced and enlarged again, and given normal noise, each by an amount drawn for the clip from
    the seed and its own pixels; so a clip always gives the same result. Left out: compression, sinc filters, the
    paper's other kernels and kinds of noise, and its second round.

    Args:
        seed: each seed gives other amounts and another noise.
        blur: least and greatest sigma of the Gaussian in pixels, > 0.
        shrink: least and greatest factor by which frames are reduced, >= 1.
        noise: least and greatest standard deviation of the noise, where the range of pixels is 2; >= 0.
    """

    def __init__(
        self,
        seed: int = 0,
        blur: tuple[float, float] = (0.2, 2.0),
        shrink: tuple[float, float] = (1.0, 2.0),
        noise: tuple[float, float] = (0.0, 0.05),
    ) -> None:
        super().__init__()
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}")
        if not 0 < blur[0] <= blur[1] < float("inf"):
            raise ValueError(f"blur: expected 0 < least <= greatest, got {list(blur)}")
        if not 1 <= shrink[0] <= shrink[1] < float("inf"):
            raise ValueError(f"shrink: expected 1 <= least <= greatest, got {list(shrink)}")
        if not 0 <= noise[0] <= noise[1] < float("inf"):
            raise ValueError(f"noise: expected 0 <= least <= greatest, got {list(noise)}")
        self.seed = seed
        self.blur, self.shrink, self.noise = ((float(least), float(most)) for least, most in (blur, shrink, noise))

    def label(self) -> str:
        """All parameters."""
        parts = (("blur", self.blur), ("shrink", self.shrink), ("noise", self.noise))
        return f"seed {self.seed}, " + ", ".join(f"{name} {least!r} to {most!r}" for name, (least, most) in parts)

    def forward(self, video: Tensor) -> Tensor:
        """B x 3 x T x H x W in [-1, 1] to the same; each clip by its own random numbers."""
        return torch.cat([self._degraded(clip) for clip in video.split(1)])

    def _degraded(self, clip: Tensor) -> Tensor:
        pixels = clip.add(1).mul(127.5).round().to(torch.uint8).cpu().numpy()
        rng = np.random.default_rng([self.seed, zlib.crc32(pixels.tobytes())])
        blur, shrink, noise = (float(rng.uniform(*limits)) for limits in (self.blur, self.shrink, self.noise))
        height, width = clip.shape[3:]
        clip = unsharp_mask(clip, blur, -1.0)  # of the detail above the blur, all is taken away
        small = max(1, round(height / shrink)), max(1, round(width / shrink))
        if small != (height, width):
            clip = resize_video(resize_video(clip, small), (height, width))
        added = torch.from_numpy(rng.standard_normal(clip.shape, dtype=np.float32)).to(clip)
        return (clip + noise * added).clamp(-1, 1)
