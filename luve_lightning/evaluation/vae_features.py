"""Features of a backbone's own VAE, where no network with FID's name can be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luve_lightning.functional.pixels import frames_to_video
from luve_lightning.metrics.feature_moments import FeatureExtractor
from luve_lightning.models.backbone import LatentCodec
from luve_lightning.models.wan_whole_clip import encode_whole_clip

# Distances of the mini backbone's features are some ten-thousandths; a hundred times the features, and tables show
# 1 to 50. It changes no order.
_SCALE = 100.0


class VAEFeatures(FeatureExtractor):
    """What the encoder of a Wan VAE knows of a patch before it is squeezed into latents.

    The input of the encoder's last convolution, averaged over space, times 100; each patch is a clip of one frame, at
    its own resolution. The network was not trained to recognise things: distances say how far the statistics of
    textures and edges are apart, and have nothing to do with FID's numbers.

    Args:
        backbone: a diffusers pipeline folder or a hub id.
    """

    kind = "vae"
    resolution = "its own size"

    def __init__(self, backbone: str | Path) -> None:
        super().__init__()
        self.backbone = backbone
        self.codec: LatentCodec | None = None
        self._fingerprint = ""

    @property
    def name(self) -> str:
        """`vae-` and the first 12 digits of the VAE's fingerprint; known after `prepare`."""
        self._loaded()
        return f"vae-{self._fingerprint[:12]}"

    @property
    def dim(self) -> int:
        """Channels before the encoder's last convolution; known after `prepare`."""
        return int(self._loaded().vae.encoder.conv_out.in_channels)

    def prepare(self, device: torch.device | str) -> None:
        """Load the VAE onto a device.

        Raises:
            FileNotFoundError: there is no such backbone.
        """
        if self.codec is None:
            codec = LatentCodec.from_pretrained(self.backbone)
            self._fingerprint = codec.fingerprint()
            codec.vae.decoder = None  # two thirds of the weights, and never used here
            self.codec = codec
        self.to(device)

    def forward(self, patches: Tensor) -> Tensor:
        """uint8 N x 3 x S x S, S a multiple of the VAE's spatial ratio, to float32 N x D."""
        codec = self._loaded()
        ratio, size = codec.spatial_ratio, patches.shape[-1]
        if size % ratio:
            raise ValueError(f"patches of {size} (patches.size) for a VAE: expected a multiple of {ratio}")
        clips = frames_to_video(patches[:, None].movedim(2, -1))  # N x 3 x 1 x S x S
        taken: list[Tensor] = []

        def take(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            del module
            taken.append(inputs[0])

        hook = codec.vae.encoder.conv_out.register_forward_pre_hook(take)
        try:
            encode_whole_clip(codec.vae, clips.to(codec.dtype))
        finally:
            hook.remove()
        return taken[0].float().mean((2, 3, 4)) * _SCALE

    def _loaded(self) -> LatentCodec:
        if self.codec is None:
            raise RuntimeError("VAEFeatures: call prepare(device) before it is used")
        return self.codec
