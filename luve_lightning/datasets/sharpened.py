"""Sharpened clips as a variant: what the high-frequency expert learns from."""

from __future__ import annotations

from torch import Tensor

from luve_lightning.datasets.encode_clips import PixelTransform
from luve_lightning.functional.sharpen import check_unsharp, unsharp_mask


class Sharpened(PixelTransform):
    """Unsharp masking of the high-resolution pixels before they are encoded (LuVe, arXiv 2602.11564).

    The paper gives neither number. The defaults are scikit-image's, a mild mask: a radius of one pixel touches the
    highest frequencies, which the HFE is there for, and draws no halos around edges.

    Args:
        radius: sigma of the Gaussian in pixels of the high-resolution clip, > 0.
        amount: how much of the detail above it is added.
    """

    def __init__(self, radius: float = 1.0, amount: float = 1.0) -> None:
        super().__init__()
        check_unsharp(radius, amount)
        self.radius, self.amount = float(radius), float(amount)

    def label(self) -> str:
        """Both numbers, with every digit."""
        return f"radius {self.radius!r}, amount {self.amount!r}"

    def forward(self, video: Tensor) -> Tensor:
        """B x C x T x H x W in [-1, 1] to the same."""
        return unsharp_mask(video, self.radius, self.amount)
