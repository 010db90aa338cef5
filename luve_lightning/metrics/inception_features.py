"""Features of clean-fid's Inception network, with its antialiased resize, in batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luve_lightning.metrics.feature_moments import FeatureExtractor
from luve_lightning.metrics.pretrained import WeightFile

INCEPTION = WeightFile(
    name="clean-fid's TorchScript Inception",
    file_name="inception-2015-12-05.pt",
    size_bytes=95_607_719,
    url="https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    purpose="fid_patch",
    sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    caches=("/tmp",),  # clean-fid's own place
)
_SIZE = 299


def resize_clean(patches: Tensor, size: int = _SIZE) -> Tensor:
    """clean-fid's "clean" resize: bicubic with an antialiasing filter on floats, not rounded, clamped to the range.

    Within 0.02 of 255 levels of Pillow's: PyTorch computes the filter's positions in float32.

    Args:
        patches: N x C x S x S with values in [0, 255], uint8 or floating point.
        size: output height and width, at least 2 (PyTorch 2.12's filter is wrong on a CPU for outputs one column
            wide).

    Returns:
        float32 N x C x size x size in [0, 255].
    """
    pixels = patches.to(torch.float32, memory_format=torch.contiguous_format)
    return F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True).clamp_(0, 255)


class InceptionFeatures(FeatureExtractor):
    """The 2048 features of FID (Heusel et al. 2017), computed as clean-fid (Parmar et al. 2022) computes them.

    The network is the TorchScript translation of the 2015 TensorFlow model that clean-fid loads. It is never
    downloaded; `WeightFile.find` says where it is looked for.

    Args:
        weights: the file, or its folder; None for the usual places.
    """

    kind = "inception"
    name = "inception-clean"
    dim = 2048
    resolution = f"{_SIZE}x{_SIZE}"
    file: ClassVar[WeightFile] = INCEPTION

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        self.weights = weights
        self.network: nn.Module | None = None

    def prepare(self, device: torch.device | str) -> None:
        """Load the network onto a device.

        Raises:
            Unavailable: its file is missing, or is not the published one.
        """
        if self.network is None:
            # Checked to the byte: whoever reads "fid_patch" in a table expects this network.
            path = self.file.find_exactly(self.weights)
            network = torch.jit.load(str(path), map_location="cpu").layers.eval()
            for parameter in network.parameters():  # a TorchScript module has no requires_grad_
                parameter.requires_grad = False
            self.network = network
        self.to(device)

    def forward(self, patches: Tensor) -> Tensor:
        """uint8 N x 3 x S x S to float32 N x 2048."""
        if self.network is None:
            raise RuntimeError("InceptionFeatures: call prepare(device) before it is used")
        pixels = resize_clean(patches)
        return self.network((pixels - 128) / 128).flatten(1)

    def __getstate__(self) -> dict[str, Any]:
        # TorchScript does not pickle: a copy in another process loads the network itself.
        modules = {name: module for name, module in self._modules.items() if name != "network"}
        return {**self.__dict__, "_modules": modules, "network": None}
