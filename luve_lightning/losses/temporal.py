"""Losses on motion."""

from __future__ import annotations

from torch import Tensor

from luve_lightning.losses.base import Loss


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
