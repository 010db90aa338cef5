"""Losses on decoded pixels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from luve_lightning.losses.base import Loss


class PixelL1(Loss):
    """L_pixel = L1(x_sr, x_hr) (LuVe, phase 2)."""

    space = "pixel"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean absolute difference of two B x 3 x T x H x W videos."""
        return F.l1_loss(prediction.float(), target.float())


class PixelMSE(Loss):
    """Mean squared error of pixels."""

    space = "pixel"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean squared difference of two B x 3 x T x H x W videos."""
        return F.mse_loss(prediction.float(), target.float())


class PixelLogMSE(Loss):
    """Natural logarithm of each clip's mean squared error, relative to `floor`: mean PSNR as a loss.

    Under the plain mean squared error the hardest clips dominate a batch; here every clip counts by how many dB it
    could gain. For pixels in [-1, 1], PSNR in dB is -10/ln(10) * (loss + ln(floor / 4)), `floor` aside.

    Args:
        weight: see Loss.
        floor: added to the mean squared error, > 0; 1e-5 is 56 dB.
    """

    space = "pixel"

    def __init__(self, weight: float = 1.0, floor: float = 1e-5) -> None:
        super().__init__(weight)
        if not floor > 0:
            raise ValueError(f"floor of PixelLogMSE must be > 0, got {floor}")
        self.floor = floor

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean over clips of ln(1 + MSE / floor), two B x 3 x T x H x W videos."""
        errors = (prediction.float() - target.float()).square().flatten(1).mean(1)
        return (errors / self.floor).log1p().mean()
