"""The cascade's second stage: how latents become those of a larger video.

The paper's methods are here: the VLUer, and interpolation of the latents themselves or of the decoded pixels. Each file
of this folder adds others. It offers them by name in `METHODS`; that name is what `luve generate --upsampling`, `luve
upsample --baselines` and the comparison of upsamplers call it. There is no other list.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from luve_lightning.functional.interpolation import InterpolationMode, Size3d, interpolate_latents
from luve_lightning.functional.pixels import resize_video
from luve_lightning.models.backbones import LatentSpace

LatentUpsampler = Callable[[Tensor, Size3d], Tensor]
"""Normalised latents B x C x t x h x w and a latent size to latents B x C x size."""


class UpsamplingModels(Protocol):
    """The models that a method may run. A pipeline has them."""

    @property
    def codec(self) -> LatentSpace:
        """The VAE."""

    @property
    def vluer(self) -> LatentUpsampler | None:
        """The trained upsampler, if there is one."""


@dataclass(frozen=True)
class LooseModels:
    """The models that a method may run, outside of a pipeline; see UpsamplingModels."""

    codec: LatentSpace
    vluer: LatentUpsampler | None = None


class UpsamplingMethod(ABC):
    """A way from latents to those of a larger video. Methods are equal when they do the same.

    Attributes:
        model: which model it runs: "vluer", "vae" or none.
    """

    model: ClassVar[Literal["vluer", "vae"] | None] = None

    @abstractmethod
    def __call__(self, latents: Tensor, size: Size3d, models: UpsamplingModels) -> Tensor:
        """Upsample.

        Args:
            latents: normalised, B x C x t x h x w.
            size: latent frames, height and width of the result.
            models: those that a method may run.

        Returns:
            Normalised latents, B x C x size, float32 for float32.
        """

    def of(self, models: UpsamplingModels) -> LatentUpsampler:
        """The method with its models, as comparisons run it."""
        return partial(self, models=models)


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
METHODS: dict[str, UpsamplingMethod] = {
    "nearest": LatentInterpolation("nearest"),
    "bilinear": LatentInterpolation("bilinear"),
    "bicubic": LatentInterpolation("bicubic"),
    "latent": LatentInterpolation("bilinear"),
    "rgb_bicubic": RGBInterpolation(),
    "rgb": RGBInterpolation(),
    "vluer": TrainedUpsampling(),
}


@cache
def upsampling_methods() -> dict[str, UpsamplingMethod]:
    """Every method by name."""
    found = dict(METHODS)
    for module in pkgutil.iter_modules(__path__):
        found |= getattr(importlib.import_module(f"{__name__}.{module.name}"), "METHODS", {})
    return found


def upsampling_method(name: str) -> UpsamplingMethod:
    """The method of that name.

    Raises:
        ValueError: there is none.
    """
    known = upsampling_methods()
    if name not in known:
        raise ValueError(f"upsampling: expected one of {', '.join(known)}, got {name!r}")
    return known[name]


def baselines(names: Sequence[str] | None = None) -> dict[str, UpsamplingMethod]:
    """The methods without a VLUer, each once under its first name, in the order of the tables.

    Args:
        names: those wanted; None is all.

    Raises:
        ValueError: for the name of none.
    """
    found: dict[UpsamplingMethod, str] = {}
    for name, method in upsampling_methods().items():
        if method.model != "vluer":
            found.setdefault(method, name)
    known = {name: method for method, name in found.items()}
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"baselines: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return {name: method for name, method in known.items() if names is None or name in names}
