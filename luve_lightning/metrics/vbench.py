"""VBench's five dimensions (arXiv 2311.17982), their average, and three of them on tiles at native resolution."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luve_lightning.functional.fidelity import frame_consistency
from luve_lightning.functional.patches import PatchPlan
from luve_lightning.functional.pixels import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    clip_view,
    dino_view,
    longer_side_view,
    normalised,
)
from luve_lightning.metrics.base import VideoMetric, frozen
from luve_lightning.metrics.frame_networks import FrameNetworkMetric, Tiled, TiledSample
from luve_lightning.metrics.iqa import MUSIQ_SPAQ, load_pyiqa
from luve_lightning.metrics.pretrained import load_aesthetic_head, load_clip, load_dino

VBENCH_DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "imaging_quality",
    "aesthetic_quality",
)
# Pairs of frames at a time: what fits into a cache is several times faster than a whole clip.
_CHUNK_VALUES = 2**23


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
            raise ValueError(f"{self.name}: backbone must give N x D features, got shape {tuple(features.shape)}")
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


class TemporalFlickering(VideoMetric):
    """VBench's TF (arXiv 2311.17982): (255 - mean |frame(t+1) - frame(t)|) / 255, over pixels, channels and frames.

    1 for a still video. It needs no network and rewards stillness: VBench means it for static scenes, which it
    filters for; LuVe's Table 1 (arXiv 2602.11564) gives it for all videos. The mean over videos is VBench's.

    Equal to VBench's number on the same decoded frames to 1e-7. VBench decodes with OpenCV. From 4.13, its pixels
    are those of our readers, bit for bit, for 8-bit files; up to 4.12 it ignored the file's colour matrix and
    assumed BT.601, which moves the number of a BT.709 file by about 1e-3. Beyond 8 bits, FFmpeg's conversions to
    BGR (OpenCV) and RGB (the readers) dither differently, which also moves it by about 1e-3.
    """

    name = "temporal_flickering"
    resolution = "native"
    least_frames = 2

    def measure(self, frames: Tensor, reference: Tensor | None) -> float:
        """The video's TF in [0, 1]."""
        frames = frames.to(self.device)
        at_once = max(1, _CHUNK_VALUES // frames[0].numel())
        pairs = zip(frames[:-1].split(at_once), frames[1:].split(at_once), strict=True)
        total = sum(int(_row_sums(earlier, later).sum(dtype=torch.int64)) for earlier, later in pairs)
        return 1 - total / (255 * frames[1:].numel())


def _row_sums(earlier: Tensor, later: Tensor) -> Tensor:
    """Sum of |later - earlier| over each row of pixels, exact: float32 counts to 2^24, a row of 16K reaches 2^23.6."""
    distance = torch.maximum(earlier, later).sub_(torch.minimum(earlier, later))
    return distance.flatten(2).float().sum(2).to(torch.int64)


def vbench_average(scores: Mapping[str, float]) -> float:
    """The unweighted mean of SC, BC, TF, IQ and AQ, the column `vbench_average`.

    In the unit of the scores: the metrics give [0, 1], LuVe's Table 1 (arXiv 2602.11564) percent. VBench itself
    (arXiv 2311.17982) has no such average; its quality score rescales and weighs seven dimensions.

    Args:
        scores: scores by column; others are ignored.

    Raises:
        ValueError: one of the five is missing; an average of fewer would be another number.
    """
    missing = [name for name in VBENCH_DIMENSIONS if name not in scores]
    if missing:
        raise ValueError(f"vbench_average needs all five dimensions, missing: {', '.join(missing)}")
    return sum(scores[name] for name in VBENCH_DIMENSIONS) / len(VBENCH_DIMENSIONS)
