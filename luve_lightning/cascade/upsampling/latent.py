"""Interpolation of the latents themselves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from luve_lightning.cascade.upsampling import UpsamplingMethod, UpsamplingModels
from luve_lightning.functional.interpolation import InterpolationMode, Size3d, interpolate_latents


@dataclass(frozen=True)
class LatentInterpolation(UpsamplingMethod):
    """Interpolates each channel of the latents; see `interpolate_latents`.

    Attributes:
        mode: nearest, bilinear or bicubic.
    """

    mode: InterpolationMode

    def __call__(self, latents: Tensor, size: Size3d, models: UpsamplingModels) -> Tensor:
        """See UpsamplingMethod."""
        del models
        return interpolate_latents(latents, size, self.mode)


# "latent" is the paper's name for linear interpolation.
METHODS = {
    "nearest": LatentInterpolation("nearest"),
    "bilinear": LatentInterpolation("bilinear"),
    "bicubic": LatentInterpolation("bicubic"),
    "latent": LatentInterpolation("bilinear"),
}
