"""LuVePipeline's work on latents without denoising: their sizes, upsampling and decoding."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from luve_lightning.cascade.luve_run import VideoType
from luve_lightning.cascade.luve_speed import LuVeSpeed
from luve_lightning.cascade.options import CascadeOptions
from luve_lightning.cascade.upsampling import UpsamplingMethod, upsampling_method
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.models.backbones import LatentSpace, denoiser_of, latent_space_of


class LuVeLatents(LuVeSpeed):
    """Stage 2 and the decoding; see LuVeComponents for the rest."""

    @torch.no_grad()
    def upsample(
        self,
        latents: Tensor,
        size: tuple[int, int],
        num_frames: int | None = None,
        method: str | UpsamplingMethod = CascadeOptions.upsampling,
    ) -> Tensor:
        """Stage 2, VLU: latents of a larger video.

        Args:
            latents: normalised, B x C x t x h x w.
            size: height and width of the larger video in pixels.
            num_frames: of the larger video; those of `latents` when None.
            method: of `upsampling_methods`, or its name.

        Returns:
            Normalised latents, float32.

        Raises:
            ValueError: for a size that is impossible, or a method that is.
        """
        method = self.check_upsampling(method)
        frames = self.codec.pixel_size(*latents.shape[2:])[0] if num_frames is None else num_frames
        self.size_rules.check(frames, height=size[0], width=size[1])
        target = self.codec.latent_size(frames, *size)
        latents = latents.to(self._execution_device, torch.float32)
        if method.model == "vae":
            latent_space_of(self.vae).wake()
        upsampled = method(latents, target, self)
        self.maybe_free_model_hooks()
        return upsampled

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: VideoType = "np") -> Any:
        """The video of latents.

        Args:
            latents: normalised, B x C x t x h x w.
            output_type: as in diffusers' pipelines, with values in [0, 1]: "np", float32 B x T x H x W x 3; "pt",
                float32 B x T x 3 x H x W; "pil", a list of B lists of T images. "latent" gives the latents back.

        Raises:
            ValueError: for another output type.
        """
        self.check_output_type(output_type)
        if output_type == "latent":
            return latents
        video = self._pixels(latents, on_device=output_type == "pt")
        self.maybe_free_model_hooks()
        return self.video_processor.postprocess_video(video, output_type)

    @property
    def codec(self) -> LatentSpace:
        """The VAE with its normalisation, on the VAE's device."""
        return latent_space_of(self.vae, self.decode_tile).to(self.vae.device)

    def _awake_codec(self) -> LatentSpace:
        """The codec on the device where it is to run, also where models are offloaded."""
        latent_space_of(self.vae).wake()  # it runs the VAE's parts, which no hook of accelerate sees
        return self.codec

    def _pixels(self, latents: Tensor, on_device: bool = True) -> Tensor:
        """Video in [-1, 1], float32, B x 3 x T x H x W; a tiled one may be gathered on the CPU."""
        codec = self._awake_codec()
        latents = latents.to(self.vae.device, torch.float32)
        if self.decode_tile is None or on_device:
            return codec.decode(latents)
        return codec.decode(latents, out=torch.empty(len(latents), 3, *codec.pixel_size(*latents.shape[2:])))

    def check_upsampling(self, method: str | UpsamplingMethod) -> UpsamplingMethod:
        """The method, unless it is unknown, or needs a VLUer and there is none."""
        method = upsampling_method(method) if isinstance(method, str) else method
        if method.model == "vluer" and self.vluer is None:
            raise ValueError(
                "upsampling: the pipeline has no VLUer: give vluer= to from_pretrained, or upsample by latent or rgb"
            )
        return method

    @staticmethod
    def check_output_type(output_type: str) -> None:
        """Refuse an unknown type of output."""
        if output_type not in get_args(VideoType):
            raise ValueError(
                f"output_type: expected one of {', '.join(get_args(VideoType))}, got {output_type!r}"
            )

    def check_tokens(self, transformer: WanTransformer3DModel, latents: Size3d) -> None:
        """Refuse latents that the transformer would crop, or that cannot be spread over devices."""
        tokens = math.prod(denoiser_of(transformer).token_grid(latents))
        if tokens % self.context_parallel_degree:
            raise ValueError(
                f"{tokens} tokens do not divide among {self.context_parallel_degree} devices: expected another size "
                "or number of devices"
            )

    def check_size(
        self, transformer: WanTransformer3DModel, size: tuple[int, int, int], prefix: str = ""
    ) -> None:
        """Refuse frames, height and width in pixels that the models would crop, naming the nearest possible ones.

        Args:
            transformer: that runs at this size.
            size: frames, height, width.
            prefix: of the arguments' names in the message.
        """
        sides = {f"{prefix}height": size[1], f"{prefix}width": size[2]}
        self.size_rules.check(size[0], **sides)
        self.check_tokens(transformer, self.codec.latent_size(*size))
