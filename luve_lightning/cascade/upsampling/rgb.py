"""Interpolation of the decoded pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from luve_lightning.cascade.upsampling import UpsamplingMethod, UpsamplingModels
from luve_lightning.functional.interpolation import Size3d, interpolate_latents
from luve_lightning.functional.pixels import resize_video


@dataclass(frozen=True)
class RGBInterpolation(UpsamplingMethod):
    """Decodes, enlarges the pixels and encodes again: the paper's "RGB interpolation".

    Pixels are enlarged bicubically in space and, where the number of frames changes, linearly in time.
    """

    model: ClassVar[Literal["vae"]] = "vae"

    def __call__(self, latents: Tensor, size: Size3d, models: UpsamplingModels) -> Tensor:
        """See UpsamplingMethod."""
        codec = models.codec
        frames, height, width = codec.pixel_size(*size)
        video = resize_video(codec.decode(latents), (height, width))
        if video.shape[2] != frames:
            video = interpolate_latents(video, (frames, height, width), "bilinear")
        return codec.encode(video)


# "rgb" is the paper's name for it.
METHODS = {"rgb_bicubic": RGBInterpolation(), "rgb": RGBInterpolation()}
