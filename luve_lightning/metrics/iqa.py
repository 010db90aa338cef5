"""MUSIQ, MANIQA and NIQE: the no-reference measures of LuVe's Table 3 (arXiv 2602.11564) that pyiqa has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from luve_lightning.functional.patches import PatchPlan
from luve_lightning.functional.vbench_views import longer_side_view, unit_images
from luve_lightning.metrics.frame_networks import TiledSample
from luve_lightning.metrics.pretrained import WeightFile
from luve_lightning.metrics.pyiqa_networks import MANIQA_KONIQ, MUSIQ_KONIQ, NIQE_PARAMETERS, load_pyiqa


class _ImageQuality(TiledSample):
    """An image measure, averaged over some frames and their tiles.

    With `resized` it sees frames as VBench's imaging quality does, at most 512 pixels on the longer side, and is
    named `..._resized`; otherwise it sees their pixels unchanged.

    Args:
        resized: use VBench's view instead of native resolution.
        backbone: replaces pyiqa's; takes N x 3 x h x w in [0, 1], returns N or N x 1 scores.
        weights: the measure's file or its folder; None to look in the usual places.
        frames: frames per video, the middles of equal parts.
        batch_size: images per forward pass of the network.
    """

    tile = 512
    native: ClassVar[str] = "native, tiles of 512x512"
    measures: ClassVar[str]
    file: ClassVar[WeightFile]

    def __init__(
        self,
        resized: bool = False,
        backbone: nn.Module | None = None,
        weights: str | Path | None = None,
        frames: int = 8,
        batch_size: int = 16,
    ) -> None:
        super().__init__(backbone, batch_size)
        self.name = f"{self.measures}_resized" if resized else self.measures
        self.resolution = "512 on the longer side, without antialiasing" if resized else self.native
        self.resized = resized
        self.weights = weights
        self.plan = PatchPlan(size=self.tile, frames=frames)

    def build(self) -> nn.Module:
        """The network from pyiqa."""
        return load_pyiqa(self.measures, self.file, self.weights, self.name)

    def images_per_frame(self, height: int, width: int) -> int:
        """Tiles of a frame, or 1."""
        return 1 if self.resized else super().images_per_frame(height, width)

    def view(self, frames: Tensor) -> Tensor:
        """VBench's view, or tiles."""
        return longer_side_view(frames) if self.resized else self.tiles(frames)

    def measure(self, frames: Tensor, reference: Tensor | None) -> Tensor:
        """The video's mean score."""
        return self.outputs(frames).double().mean()


class Musiq(_ImageQuality):
    """MUSIQ trained on KonIQ-10k, 0 to 100, higher is better."""

    measures = "musiq"
    file = MUSIQ_KONIQ


class Maniqa(_ImageQuality):
    """MANIQA trained on KonIQ-10k, 0 to 1, higher is better.

    pyiqa takes crops of 224x224 from each image, so tiles only give it more of them.
    """

    measures = "maniqa"
    file = MANIQA_KONIQ


class Niqe(_ImageQuality):
    """NIQE (Mittal et al. 2013): distance to the statistics of pristine photographs, lower is better.

    Compares the statistics of a frame's blocks of 96x96 pixels: whole frames at native resolution, no tiles.
    """

    measures = "niqe"
    file = NIQE_PARAMETERS
    higher_is_better = False
    native = "native, whole frames"

    def batches(self, frames: Tensor) -> Iterator[Tensor]:
        """One frame at a time: the network keeps many maps of it, and a 4K frame alone takes 100 MB."""
        for frame in frames.split(1):
            yield self.view(frame.to(self.device))

    def view(self, frames: Tensor) -> Tensor:
        """VBench's view, or whole frames."""
        return super().view(frames) if self.resized else unit_images(frames)
