"""Upsampling a video with a backbone's VAE and a VLUer."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from luve_lightning.functional.interpolation import Size3d
from luve_lightning.models.backbone import LatentCodec
from luve_lightning.models.vluer import VLUer

OutputType = Literal["latent", "pt", "np"]


@dataclass
class VLUerPipelineOutput(BaseOutput):
    """What `VLUerPipeline` returns.

    Attributes:
        frames: see `VLUerPipeline.__call__`.
    """

    frames: Tensor | np.ndarray


class VLUerPipeline:
    """Encode (or take latents), upsample them, decode (or give latents).

    Args:
        codec: the backbone's VAE.
        vluer: for its latents.

    Example:
        >>> pipeline = VLUerPipeline.from_pretrained("data/mini/wan", "data/mini/vluer")  # doctest: +SKIP
        >>> frames = pipeline(video, scale=2).frames  # doctest: +SKIP
    """

    def __init__(self, codec: LatentCodec, vluer: VLUer) -> None:
        if vluer.config.latent_channels != codec.channels:
            raise ValueError(
                f"the VLUer takes {vluer.config.latent_channels} latent channels, the VAE has {codec.channels}"
            )
        self.codec, self.vluer = codec.eval(), vluer.eval()

    @classmethod
    def from_pretrained(
        cls, backbone: str | Path, vluer: str | Path, dtype: torch.dtype | None = None
    ) -> VLUerPipeline:
        """Load both parts.

        Args:
            backbone: pipeline folder or hub id; its `vae/` is used.
            vluer: folder written by `VLUer.save_pretrained`.
            dtype: of both models' weights; float32 when None.

        Raises:
            FileNotFoundError: when one of them is not there.
            ValueError: when they do not fit together.
        """
        if not (Path(vluer) / "config.json").is_file():
            raise FileNotFoundError(f"vluer {vluer}: no config.json there; expected a folder saved by VLUer")
        codec = LatentCodec.from_pretrained(backbone, dtype)
        return cls(codec, VLUer.from_pretrained(vluer, torch_dtype=dtype or torch.float32))

    def to(self, device: torch.device | str) -> VLUerPipeline:
        """Move both models to a device; returns the pipeline."""
        self.codec.to(device)
        self.vluer.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.codec.latents_mean.device

    @torch.no_grad()
    def __call__(
        self,
        video: Tensor | None = None,
        latents: Tensor | None = None,
        *,
        size: tuple[int, int] | None = None,
        scale: float | None = None,
        num_frames: int | None = None,
        output_type: OutputType = "np",
        return_dict: bool = True,
    ) -> VLUerPipelineOutput | tuple[Any, ...]:
        """Upsample a video.

        Args:
            video: B x 3 x T x H x W in [-1, 1], T = 4k + 1, H and W multiples of 8 for Wan's VAE; or give latents.
            latents: normalised, B x C x t x h x w.
            size: output height and width in pixels; or give a scale.
            scale: factor of height and width, > 0; h and w in latents times the scale must be whole.
            num_frames: output frames, 4k + 1; the input's when None.
            output_type: "np": float32 array B x T x H x W x 3 in [0, 1], of which diffusers' `export_to_video`
                takes one clip; "pt": float32 tensor B x 3 x T x H x W in [-1, 1], as `video`; "latent":
                normalised latents.
            return_dict: False returns a tuple.

        Returns:
            The upsampled video or latents as `.frames`, tensors on the pipeline's device.

        Raises:
            ValueError: for a size that the VAE cannot make, naming the nearest ones; and unless exactly one of
                `video` and `latents`, and of `size` and `scale`, is given.
        """
        self.check_inputs(video, latents, size, scale, output_type)
        if video is not None:
            frames = video.shape[2]
            _, *grid = self.codec.latent_size(*video.shape[2:])
        else:
            assert latents is not None
            frames = self.codec.pixel_size(*latents.shape[2:])[0]
            grid = list(latents.shape[3:])
        # Before the encoding, which takes the time: an impossible size must be refused at once.
        target = self.target_size(num_frames or frames, (grid[0], grid[1]), size, scale)
        if video is not None:
            latents = self.codec.encode(video.to(self.device))
        assert latents is not None
        upsampled = self.vluer(latents.to(self.device, torch.float32), target)
        result = upsampled if output_type == "latent" else self._decode(upsampled, output_type)
        return VLUerPipelineOutput(frames=result) if return_dict else (result,)

    def check_inputs(
        self,
        video: Tensor | None,
        latents: Tensor | None,
        size: tuple[int, int] | None,
        scale: float | None,
        output_type: str,
    ) -> None:
        """Refuse what does not go together; see `__call__`."""
        if (video is None) == (latents is None):
            raise ValueError("expected either video or latents")
        if (size is None) == (scale is None):
            raise ValueError("expected either size (height, width) or scale")
        if output_type not in get_args(OutputType):
            raise ValueError(
                f"output_type: expected one of {', '.join(get_args(OutputType))}, got {output_type!r}"
            )
        name, given, channels = (
            ("video", video, 3) if video is not None else ("latents", latents, self.codec.channels)
        )
        assert given is not None
        if given.ndim != 5 or given.shape[1] != channels or 0 in given.shape:
            raise ValueError(
                f"{name} must be B x {channels} x frames x height x width, got shape {tuple(given.shape)}"
            )

    def target_size(
        self, frames: int, grid: tuple[int, int], size: tuple[int, int] | None, scale: float | None
    ) -> Size3d:
        """The output's latent frames, height and width.

        Args:
            frames: output frames.
            grid: the input's latent height and width.
            size: output height and width in pixels, or None.
            scale: of `grid`, when there is no size.

        Raises:
            ValueError: for a size that the VAE cannot make, naming the nearest ones.
        """
        if size is not None:
            return self.codec.latent_size(frames, *size)
        if scale is None or not 0 < scale < float("inf"):
            raise ValueError(f"scale must be > 0, got {scale}")
        exact = Fraction(str(scale))  # 1.1 is 11/10 here, not the binary fraction beside it
        height, width = grid[0] * exact, grid[1] * exact
        for name, n, wanted in (("height", grid[0], height), ("width", grid[1], width)):
            if wanted.denominator != 1:
                near = [k for k in (int(wanted), int(wanted) + 1) if k]
                raise ValueError(
                    f"scale {scale:g} makes a latent {name} of {n} into {float(wanted):g}; nearest whole ones are "
                    + " and ".join(f"{k} (scale {k}/{n} = {k / n:.6g})" for k in near)
                    + "; or give size"
                )
        return self.codec.latent_size(frames, *self.codec.pixel_size(1, int(height), int(width))[1:])

    def _decode(self, latents: Tensor, output_type: OutputType) -> Tensor | np.ndarray:
        video = self.codec.decode(latents)
        if output_type == "pt":
            return video
        return video.permute(0, 2, 3, 4, 1).add(1).div(2).cpu().numpy()
