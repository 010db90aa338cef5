"""Training losses, one nn.Module a file."""

from luve_lightning.losses.base import Loss
from luve_lightning.losses.flow import VelocityMSE
from luve_lightning.losses.latent import LatentL1
from luve_lightning.losses.pixel import PixelL1, PixelLogMSE, PixelMSE
from luve_lightning.losses.temporal import FrameDifferenceL1

__all__ = ["FrameDifferenceL1", "LatentL1", "Loss", "PixelL1", "PixelLogMSE", "PixelMSE", "VelocityMSE"]
