"""The ways of upsampling latents that are compared: learned, interpolation, and interpolation of pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor

from luve_lightning.functional.interpolation import Size3d, interpolate_latents
from luve_lightning.functional.resize import resize_video
from luve_lightning.models.backbone import LatentCodec

# Normalised latents B x C x t x h x w and an output size to latents of that size.
UpsamplingMethod = Callable[[Tensor, Size3d], Tensor]

BASELINES = ("nearest", "bilinear", "bicubic", "rgb_bicubic")
# The high-resolution latents themselves: what the VAE makes of the clip, which no upsampler of latents can pass.
CEILING = "vae"


def baseline_methods(codec: LatentCodec) -> dict[str, UpsamplingMethod]:
    """The methods that learn nothing, by name, in the tables' order (`BASELINES`).

    Args:
        codec: the VAE that `rgb_bicubic` decodes and encodes with.
    """
    methods: list[UpsamplingMethod] = [
        partial(interpolate_latents, mode="nearest"),
        partial(interpolate_latents, mode="bilinear"),
        partial(interpolate_latents, mode="bicubic"),
        partial(rgb_bicubic, codec),
    ]
    return dict(zip(BASELINES, methods, strict=True))


def rgb_bicubic(codec: LatentCodec, latents: Tensor, size: Size3d) -> Tensor:
    """Decode, upsample the pixels, encode again: the paper's "RGB interpolation".

    Pixels are upsampled bicubically in space and, when the number of frames changes, linearly in time.

    Args:
        codec: the VAE.
        latents: normalised, B x C x t x h x w.
        size: output latent frames, height and width.

    Returns:
        B x C x size, float32.
    """
    frames, height, width = codec.pixel_size(*size)
    video = resize_video(codec.decode(latents), (height, width))
    if video.shape[2] != frames:
        video = interpolate_latents(video, (frames, height, width), "bilinear")
    return codec.encode(video)


def method_names(extra: Iterable[str] = ()) -> list[str]:
    """Every row of a table in order: the trained VLUer, further ones, the baselines, the ceiling.

    Args:
        extra: names of further VLUers.

    Raises:
        ValueError: when a further VLUer has the name of another row.
    """
    names = ["vluer", *extra, *BASELINES, CEILING]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"extra: {', '.join(twice)}: the comparison has a method of that name already")
    return names
