"""What a network must be to give features for a Fréchet distance."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FeatureExtractor(nn.Module):
    """Patches to feature vectors, frozen.

    Constructors take configuration values and load nothing; `prepare` does. A subclass defines what raises
    NotImplementedError here.

    Attributes:
        kind: word of the column `fd_patch_<kind>`, e.g. "vae"; "inception" is FID's own network.
        resolution: the size at which the network sees a patch, in words.
    """

    kind: str
    resolution: str

    @property
    def name(self) -> str:
        """Identifies the network and its weights, e.g. "inception-clean": equal names, comparable features."""
        raise NotImplementedError

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        raise NotImplementedError

    def prepare(self, device: torch.device | str) -> None:
        """Load what is needed, once, and move it to a device.

        Raises:
            Unavailable: a file or a package is missing.
        """
        self.to(device)

    def forward(self, patches: Tensor) -> Tensor:
        """Features of patches; resizing and normalisation are the extractor's own business.

        Args:
            patches: uint8 N x 3 x S x S, full-range sRGB, on the device given to `prepare`.

        Returns:
            float32 N x D.
        """
        raise NotImplementedError

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stay in evaluation mode: features must not depend on what is beside them in a batch."""
        del mode
        return super().train(False)
