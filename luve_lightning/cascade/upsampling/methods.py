"""The paper's methods: the VLUer, and interpolation of the latents themselves or of the decoded pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from luve_lightning.cascade.upsampling import UpsamplingMethod, UpsamplingModels
from luve_lightning.functional.interpolation import InterpolationMode, Size3d, interpolate_latents
from luve_lightning.functional.pixels import resize_video


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


@dataclass(frozen=True)
class TrainedUpsampling(UpsamplingMethod):
    """Runs the video latent upsampler."""

    model: ClassVar[Literal["vluer"]] = "vluer"

    def __call__(self, latents: Tensor, size: Size3d, models: UpsamplingModels) -> Tensor:
        """See UpsamplingMethod.

        Raises:
            ValueError: there is no VLUer.
        """
        if models.vluer is None:
            raise ValueError("upsampling: there is no VLUer; upsample by latent or rgb, which need none")
        return models.vluer(latents, size)


# "latent" and "rgb" are the paper's names: linear interpolation of latents, bicubic of pixels.
METHODS = {
    "nearest": LatentInterpolation("nearest"),
    "bilinear": LatentInterpolation("bilinear"),
    "bicubic": LatentInterpolation("bicubic"),
    "latent": LatentInterpolation("bilinear"),
    "rgb_bicubic": RGBInterpolation(),
    "rgb": RGBInterpolation(),
    "vluer": TrainedUpsampling(),
}
