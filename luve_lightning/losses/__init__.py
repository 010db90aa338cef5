"""Training losses."""

from luve_lightning.losses.terms import (
    FrameDifferenceL1,
    LatentL1,
    Loss,
    PixelL1,
    PixelLogMSE,
    PixelMSE,
    VelocityLoss,
    VelocityMSE,
)

__all__ = ["FrameDifferenceL1", "LatentL1", "Loss", "PixelL1", "PixelLogMSE", "PixelMSE", "VelocityLoss", "VelocityMSE"]
