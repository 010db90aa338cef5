"""The base of every loss: a module that compares a prediction with a target in a named space."""

from __future__ import annotations

from typing import ClassVar, Literal

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
