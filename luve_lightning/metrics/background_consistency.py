"""VBench's background consistency: how much each frame resembles the first and the previous one to CLIP."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from luve_lightning.functional.vbench_views import CLIP_MEAN, CLIP_STD, clip_view, normalised
from luve_lightning.metrics.frame_networks import Tiled
from luve_lightning.metrics.pretrained import load_clip
from luve_lightning.metrics.subject_consistency import SubjectConsistency


class BackgroundConsistency(SubjectConsistency):
    """VBench's BC (arXiv 2311.17982), in [0, 1]: `frame_consistency` of CLIP ViT-B/32's image embeddings.

    Like `SubjectConsistency` with another network, whose view leaves out the sides: at 16:9, 44 % of the frame.

    Args:
        backbone: replaces CLIP; takes N x 3 x 224 x 224 in CLIP's colours, returns N x D.
        weights: a folder of transformers' `CLIPVisionModelWithProjection`, or the name of one in the hub's cache.
        by_frames: weigh videos by their number of frame pairs, as VBench does on one and on several GPUs.
        batch_size: frames per forward pass of the network.
    """

    name = "background_consistency"
    resolution = "224 on the shorter side, without antialiasing, and of that the 224x224 in the middle"

    def __init__(
        self,
        backbone: nn.Module | None = None,
        weights: str | Path = "openai/clip-vit-base-patch32",
        by_frames: bool = True,
        batch_size: int = 32,
    ) -> None:
        super().__init__(backbone, weights, by_frames, batch_size)

    def build(self) -> nn.Module:
        """CLIP ViT-B/32."""
        return load_clip(self.weights, self.name, "CLIP ViT-B/32, 605 MB")

    def view(self, frames: Tensor) -> Tensor:
        """VBench's view of the frames' middles."""
        return clip_view(frames)


class BackgroundConsistencyTiles(Tiled, BackgroundConsistency):
    """`BackgroundConsistency` of 224x224 tiles at native resolution, averaged over positions in the frame."""

    name = "background_consistency_tiles"
    resolution = "native, tiles of 224x224"
    tile = 224

    def view(self, frames: Tensor) -> Tensor:
        """Tiles in CLIP's colours."""
        return normalised(self.tiles(frames), CLIP_MEAN, CLIP_STD)
