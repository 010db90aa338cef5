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
    """Mean squared error of pixels: what PSNR measures; used for the mini VAE."""

    space = "pixel"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean squared difference of two B x 3 x T x H x W videos."""
        return F.mse_loss(prediction.float(), target.float())
