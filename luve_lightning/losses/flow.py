"""Losses of flow matching."""

from __future__ import annotations

from torch import Tensor

from luve_lightning.losses.reconstruction import Loss


class VelocityMSE(Loss):
    """Mean squared error of the predicted velocity noise - x0: flow matching's own loss."""

    space = "velocity"

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of each sample of two B x C x t x h x w tensors, shape (B,)."""
        return (prediction.float() - target.float()).square().flatten(1).mean(1)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean squared difference of two B x C x t x h x w tensors."""
        return self.per_sample(prediction, target).mean()
