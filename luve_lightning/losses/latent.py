"""Losses on latents."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from luve_lightning.losses.base import Loss


class LatentL1(Loss):
    """L_latent = L1(z_sr, z_hr) on normalised latents (LuVe, phase 1)."""

    space = "latent"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean absolute difference of two B x C x t x h x w tensors."""
        return F.l1_loss(prediction.float(), target.float())
