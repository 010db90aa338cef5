"""Losses of flow matching."""

from __future__ import annotations

from torch import Tensor

from luve_lightning.losses.reconstruction import Loss


class VelocityLoss(Loss):
    """A comparison of velocities noise - x0 sample by sample, because each sample has its own noise level.

    Args:
        weight: see Loss.
    """

    space = "velocity"

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of each sample of two B x C x t x h x w tensors, shape (B,)."""
        raise NotImplementedError

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean over the samples of two B x C x t x h x w tensors."""
        return self.per_sample(prediction, target).mean()


class VelocityMSE(VelocityLoss):
    """Mean squared error of the predicted velocity: flow matching's own loss."""

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of each sample of two B x C x t x h x w tensors, shape (B,)."""
        return (prediction.float() - target.float()).square().flatten(1).mean(1)
