"""VBench's subject consistency: how much each frame resembles the first and the previous one to DINO."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from luve_lightning.functional.fidelity import frame_consistency
from luve_lightning.functional.vbench_views import IMAGENET_MEAN, IMAGENET_STD, dino_view, normalised
from luve_lightning.metrics.frame_networks import FrameNetworkMetric, Tiled
from luve_lightning.metrics.pretrained import load_dino


class SubjectConsistency(FrameNetworkMetric):
    """VBench's SC (arXiv 2311.17982), in [0, 1]: `frame_consistency` of DINO ViT-B/16's class tokens.

    Uses every frame. VBench weighs videos by their number of frame pairs, and so does this mean; on several GPUs
    VBench weighs them equally, as `by_frames=False` does. Both agree for videos of one length.

    Args:
        backbone: replaces DINO; takes N x 3 x h x w in ImageNet's colours, returns N x D.
        weights: a folder of transformers' `ViTModel`, or the name of one in the hub's cache.
        by_frames: weigh videos by their number of frame pairs.
        batch_size: frames per forward pass of the network.
    """

    name = "subject_consistency"
    resolution = "224 on the shorter side, without antialiasing: 224x398 of 2160x3840"
    least_frames = 2

    def __init__(
        self,
        backbone: nn.Module | None = None,
        weights: str | Path = "facebook/dino-vitb16",
        by_frames: bool = True,
        batch_size: int = 32,
    ) -> None:
        super().__init__(backbone, batch_size)
        self.weights = weights
        self.by_frames = by_frames

    def build(self) -> nn.Module:
        """DINO."""
        return load_dino(self.weights, self.name)

    def view(self, frames: Tensor) -> Tensor:
        """VBench's view of whole frames."""
        return dino_view(frames)

    def weight(self, frames: Tensor) -> float:
        """The number of pairs of neighbouring frames, or 1."""
        return len(frames) - 1 if self.by_frames else 1

    def measure(self, frames: Tensor, reference: Tensor | None) -> Tensor:
        """The video's SC; with tiles, the mean over tile positions."""
        features = self.outputs(frames)
        if features.ndim != 2:
            raise ValueError(
                f"{self.name}: backbone must give N x D features, got shape {tuple(features.shape)}"
            )
        return frame_consistency(features.unflatten(0, (len(frames), -1)).transpose(0, 1)).mean()


class SubjectConsistencyTiles(Tiled, SubjectConsistency):
    """`SubjectConsistency` of 224x224 tiles at native resolution, averaged over positions in the frame.

    Sees detail that VBench's view skips, and is stricter: what moves out of a tile counts against it.
    """

    name = "subject_consistency_tiles"
    resolution = "native, tiles of 224x224"
    tile = 224

    def view(self, frames: Tensor) -> Tensor:
        """Tiles in ImageNet's colours."""
        return normalised(self.tiles(frames), IMAGENET_MEAN, IMAGENET_STD)
