"""Losses on latents, decoded pixels, motion and velocities, and the base of them all."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn


class Loss(nn.Module):
    """A weighted comparison of two tensors of the same shape.

    `space` says what the loss takes: "latent" tensors (B x C x t x h x w), decoded "pixel" tensors (B x 3 x T x H
    x W in [-1, 1], not clamped) or flow-matching "velocity" tensors (B x C x t x h x w). A task decodes only when
    a loss in pixel space is active.

    Args:
        weight: factor of this term in the total loss, >= 0.
    """

    space: ClassVar[Literal["latent", "pixel", "velocity"]]

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"weight of {type(self).__name__} must be >= 0, got {weight}")
        self.weight = weight

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The unweighted loss, a scalar."""
        raise NotImplementedError


class LatentL1(Loss):
    """L_latent = L1(z_sr, z_hr) on normalised latents (LuVe, phase 1)."""

    space = "latent"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean absolute difference of two B x C x t x h x w tensors."""
        return F.l1_loss(prediction.float(), target.float())


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


class FrameDifferenceL1(Loss):
    """L_frame = 1/(n-1) * sum_{t=2..n} ||dx_sr(t) - dx_hr(t)||_1 with dx(t) = x(t) - x(t-1) (LuVe, phase 2).

    The norm is the mean over pixels, so that the term does not grow with the crop.
    """

    space = "pixel"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean absolute difference of the frame-to-frame changes of two B x 3 x T x H x W videos; 0 for one frame."""
        if prediction.shape[2] < 2:
            return prediction.float().sum() * 0.0
        return (prediction.float().diff(dim=2) - target.float().diff(dim=2)).abs().mean()


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
