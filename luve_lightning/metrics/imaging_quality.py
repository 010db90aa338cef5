"""VBench's imaging quality: MUSIQ on small frames."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from luve_lightning.functional.patches import PatchPlan
from luve_lightning.functional.vbench_views import longer_side_view
from luve_lightning.metrics.frame_networks import FrameNetworkMetric, TiledSample
from luve_lightning.metrics.iqa import MUSIQ_SPAQ, load_pyiqa


class ImagingQuality(FrameNetworkMetric):
    """VBench's IQ (arXiv 2311.17982): MUSIQ trained on SPAQ, divided by 100, averaged over all frames.

    About 0 to 1. VBench's file gives a video's score from 0 to 100 and divides only their mean. This is its
    default mode, `longer`. The mean over videos weighs them equally.

    Args:
        backbone: replaces MUSIQ; takes N x 3 x h x w in [0, 1], returns N or N x 1 scores of 0 .. 100.
        weights: the file `musiq_spaq_ckpt-358bb6af.pth` or its folder; None to look in the usual places.
        batch_size: frames per forward pass of the network.
    """

    name = "imaging_quality"
    resolution = "512 on the longer side, without antialiasing: 288x512 of 2160x3840"

    def __init__(
        self, backbone: nn.Module | None = None, weights: str | Path | None = None, batch_size: int = 16
    ) -> None:
        super().__init__(backbone, batch_size)
        self.weights = weights

    def build(self) -> nn.Module:
        """MUSIQ from pyiqa."""
        return load_pyiqa("musiq-spaq", MUSIQ_SPAQ, self.weights, self.name)

    def view(self, frames: Tensor) -> Tensor:
        """VBench's view of whole frames."""
        return longer_side_view(frames)

    def measure(self, frames: Tensor, reference: Tensor | None) -> Tensor:
        """The video's mean score."""
        return self.outputs(frames).double().mean() / 100


class ImagingQualityTiles(TiledSample, ImagingQuality):
    """`ImagingQuality` at native resolution: of 512x512 tiles of the frames.

    Args:
        backbone: see `ImagingQuality`.
        weights: see `ImagingQuality`.
        frames: frames per video, the middles of equal parts; at 3840x2160 a frame has 28 tiles.
        batch_size: tiles per forward pass of the network.
    """

    name = "imaging_quality_tiles"
    resolution = "native, tiles of 512x512"
    tile = 512

    def __init__(
        self,
        backbone: nn.Module | None = None,
        weights: str | Path | None = None,
        frames: int = 8,
        batch_size: int = 16,
    ) -> None:
        super().__init__(backbone, weights, batch_size)
        self.plan = PatchPlan(size=self.tile, frames=frames)

    def view(self, frames: Tensor) -> Tensor:
        """Tiles."""
        return self.tiles(frames)
