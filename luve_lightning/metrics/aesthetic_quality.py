"""VBench's aesthetic quality: LAION's predictor on small frames."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from luve_lightning.functional.vbench_views import clip_view
from luve_lightning.metrics.base import frozen
from luve_lightning.metrics.frame_networks import FrameNetworkMetric
from luve_lightning.metrics.pretrained import load_aesthetic_head, load_clip


class AestheticQuality(FrameNetworkMetric):
    """VBench's AQ (arXiv 2311.17982): LAION's linear head on CLIP ViT-L/14, divided by 10, averaged over all frames.

    About 0.1 to 1. The mean over videos weighs them equally.

    Args:
        backbone: replaces CLIP; takes N x 3 x 224 x 224 in CLIP's colours, returns N x D.
        head: replaces LAION's; takes N x D of length 1, returns N x 1.
        weights: a folder of transformers' `CLIPVisionModelWithProjection`, or the name of one in the hub's cache.
        head_weights: the file `sa_0_4_vit_l_14_linear.pth` or its folder; None to look in the usual places.
        batch_size: images per forward pass of the network.
    """

    name = "aesthetic_quality"
    resolution = "224 on the shorter side, without antialiasing, and of that the 224x224 in the middle"
    head: nn.Module | None

    def __init__(
        self,
        backbone: nn.Module | None = None,
        head: nn.Module | None = None,
        weights: str | Path = "openai/clip-vit-large-patch14",
        head_weights: str | Path | None = None,
        batch_size: int = 32,
    ) -> None:
        super().__init__(backbone, batch_size)
        self.head = None if head is None else frozen(head)
        self.weights = weights
        self.head_weights = head_weights

    def build(self) -> nn.Module:
        """CLIP ViT-L/14."""
        return load_clip(self.weights, self.name, "CLIP ViT-L/14, 1.7 GB")

    def load(self) -> None:
        """Load the head, then the network, on the metric's device."""
        if self.head is None:
            self.head = frozen(load_aesthetic_head(self.head_weights)).to(self.device)
        super().load()

    def view(self, frames: Tensor) -> Tensor:
        """VBench's view of the frames' middles."""
        return clip_view(frames)

    def measure(self, frames: Tensor, reference: Tensor | None) -> Tensor:
        """The video's mean score."""
        assert self.head is not None
        return self.head(F.normalize(self.outputs(frames), dim=-1)).double().mean() / 10
