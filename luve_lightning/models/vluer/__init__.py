"""VLUer: the video latent upsampler."""

from luve_lightning.models.vluer.model import VLUer

__all__ = ["VLUer"]
