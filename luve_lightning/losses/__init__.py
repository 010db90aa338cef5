"""Training losses, one nn.Module a file."""

from luve_lightning.losses.flow import VelocityLoss, VelocityMSE
from luve_lightning.losses.reconstruction import (
    FrameDifferenceL1,
    LatentL1,
    Loss,
    PixelL1,
    PixelLogMSE,
    PixelMSE,
)

__all__ = [
    "FrameDifferenceL1",
    "LatentL1",
    "Loss",
    "PixelL1",
    "PixelLogMSE",
    "PixelMSE",
    "VelocityLoss",
    "VelocityMSE",
]
