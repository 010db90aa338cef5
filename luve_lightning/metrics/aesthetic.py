"""The aesthetic score at native resolution."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from luve_lightning.functional.patches import PatchPlan
from luve_lightning.functional.vbench_views import CLIP_MEAN, CLIP_STD, normalised
from luve_lightning.metrics.aesthetic_quality import AestheticQuality
from luve_lightning.metrics.frame_networks import TiledSample


class Aesthetic(TiledSample, AestheticQuality):
    """`AestheticQuality` at native resolution: of 224x224 tiles of the frames.

    Same predictor and scale (a tenth of LAION's), averaged over tiles and frames. It judges detail, not
    composition, so compare its values with each other, not with `AestheticQuality`'s.

    Args:
        backbone: see `AestheticQuality`.
        head: see `AestheticQuality`.
        weights: see `AestheticQuality`.
        head_weights: see `AestheticQuality`.
        frames: frames per video, the middles of equal parts; at 3840x2160 a frame has 153 tiles.
        batch_size: tiles per forward pass of the network.
    """

    name = "aesthetic"
    resolution = "native, tiles of 224x224"
    tile = 224

    def __init__(
        self,
        backbone: nn.Module | None = None,
        head: nn.Module | None = None,
        weights: str | Path = "openai/clip-vit-large-patch14",
        head_weights: str | Path | None = None,
        frames: int = 8,
        batch_size: int = 32,
    ) -> None:
        super().__init__(backbone, head, weights, head_weights, batch_size)
        self.plan = PatchPlan(size=self.tile, frames=frames)

    def view(self, frames: Tensor) -> Tensor:
        """Tiles in CLIP's colours."""
        return normalised(self.tiles(frames), CLIP_MEAN, CLIP_STD)
