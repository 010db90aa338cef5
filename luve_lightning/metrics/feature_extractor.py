"""The interface of a network that gives features for a Fréchet distance."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FeatureExtractor(nn.Module):
    """Patches to feature vectors, frozen.

    Constructors take configuration values and load nothing; `prepare` does. A subclass defines the methods that
    raise NotImplementedError here.

    Attributes:
        kind: suffix of the column `fd_patch_<kind>`, e.g. "vae"; "inception" is FID's own network.
        resolution: size at which the network sees a patch, in words.
    """

    kind: str
    resolution: str

    @property
    def name(self) -> str:
        """Identifies the network and its weights, e.g. "inception-clean"; equal names mean comparable features."""
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
        """Features of patches; the extractor resizes and normalises them itself.

        Args:
            patches: uint8 N x 3 x S x S, full-range sRGB, on the device given to `prepare`.

        Returns:
            float32 N x D.
        """
        raise NotImplementedError

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stay in evaluation mode: features must not depend on the rest of the batch."""
        del mode
        return super().train(False)
