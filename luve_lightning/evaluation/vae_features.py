"""Features of a backbone's own VAE, for machines without FID's network."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from luve_lightning.functional.pixels import frames_to_video
from luve_lightning.metrics.feature_moments import LoadedFeatures
from luve_lightning.models.backbones import LatentSpace, load_backbone

# Distances between the mini backbone's features are some ten-thousandths; with a hundred times the features,
# tables show 1 to 50. The order stays.
_SCALE = 100.0


class VAEFeatures(LoadedFeatures[LatentSpace]):
    """The VAE encoder's view of a patch, before it is squeezed into latents.

    `LatentSpace.features` averaged over space, times 100; each patch is a clip of one frame, at its own
    resolution. The network was not trained to recognise things: distances say how far apart the statistics of
    textures and edges are, and have nothing to do with FID's numbers.

    Args:
        backbone: a diffusers pipeline folder or a hub id.
    """

    kind, family = "vae", "vae"
    resolution = "its own size"

    def __init__(self, backbone: str | Path) -> None:
        super().__init__()
        self.backbone = backbone

    def load(self) -> tuple[LatentSpace, str]:
        """The VAE without its decoder, and its fingerprint.

        Raises:
            FileNotFoundError: there is no such backbone.
        """
        codec = load_backbone(self.backbone).latent_space()
        fingerprint = codec.fingerprint()
        codec.forget_decoder()  # unused here
        return codec, fingerprint

    @property
    def dim(self) -> int:
        """Channels of `LatentSpace.features`; known after `prepare`."""
        return self.network.feature_channels

    def forward(self, patches: Tensor) -> Tensor:
        """uint8 N x 3 x S x S, S a multiple of the VAE's spatial ratio, to float32 N x D."""
        codec, size = self.network, patches.shape[-1]
        if size % codec.spatial_ratio:
            raise ValueError(
                f"patches of {size} (patches.size) for a VAE: expected a multiple of {codec.spatial_ratio}"
            )
        clips = frames_to_video(patches[:, None].movedim(2, -1))  # N x 3 x 1 x S x S
        return codec.features(clips).float().mean((2, 3, 4)) * _SCALE
