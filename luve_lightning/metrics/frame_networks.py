"""Metrics that show frames, or native-resolution tiles of frames, to one network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from luve_lightning.functional.patches import PatchPlan, cut_patches
from luve_lightning.metrics.base import VideoMetric, frozen


class FrameNetworkMetric(VideoMetric):
    """A metric computed from one network's output for each frame.

    A subclass defines `build` (the network, unless one is given), `view` (its input) and `measure`.

    Args:
        backbone: replaces the published network; set to evaluation mode, without gradients.
        batch_size: images per forward pass.
    """

    backbone: nn.Module | None

    def __init__(self, backbone: nn.Module | None = None, batch_size: int = 32, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if batch_size < 1:
            raise ValueError(f"{type(self).__name__}.batch_size: expected at least 1, got {batch_size}")
        self.backbone = None if backbone is None else frozen(backbone)
        self.batch_size = batch_size

    def build(self) -> nn.Module:
        """Load the published network from a local file.

        Raises:
            Unavailable: it is not there.
        """
        raise NotImplementedError

    def load(self) -> None:
        """Load the network onto the metric's device."""
        if self.backbone is None:
            self.backbone = frozen(self.build()).to(self.device)

    def images_per_frame(self, height: int, width: int) -> int:
        """How many images `view` makes of a frame of this size."""
        return 1

    def view(self, frames: Tensor) -> Tensor:
        """The network's input for uint8 T x H x W x 3: float32 N x 3 x h x w, N = T * images_per_frame."""
        raise NotImplementedError

    def batches(self, frames: Tensor) -> Iterator[Tensor]:
        """A video's views on the metric's device, at most `batch_size` images at a time, frame by frame."""
        frames_at_once = max(1, self.batch_size // self.images_per_frame(*frames.shape[1:3]))
        for part in frames.split(frames_at_once):
            yield from self.view(part.to(self.device)).split(self.batch_size)

    def outputs(self, frames: Tensor) -> Tensor:
        """The network's output for each image, float32, T * images_per_frame x ... ."""
        assert self.backbone is not None
        # pyiqa's NIQE returns a bare number for one image.
        return torch.cat([torch.atleast_1d(self.backbone(images).float()) for images in self.batches(frames)])


class Tiled(FrameNetworkMetric):
    """The same metric on tiles of the full-size frame instead of the shrunken frame.

    As many tiles as fit side by side, spread evenly from edge to edge: 9 x 17 of 224 pixels at 3840x2160. List it
    before the metric among the bases.
    """

    tile: ClassVar[int]

    def images_per_frame(self, height: int, width: int) -> int:
        """Tiles of a frame."""
        return self._corners(height, width).shape[0]

    def tiles(self, frames: Tensor) -> Tensor:
        """Cut tiles.

        Args:
            frames: uint8 T x H x W x 3.

        Returns:
            float32 N x 3 x tile x tile in [0, 1], all tiles of the first frame first.
        """
        corners = self._corners(*frames.shape[1:3]).to(frames.device)
        time = torch.arange(len(frames), device=frames.device).repeat_interleave(len(corners))
        places = torch.cat([time[:, None], corners.repeat(len(frames), 1)], dim=1)
        return cut_patches(frames, places, self.tile).float() / 255

    def _corners(self, height: int, width: int) -> Tensor:
        if min(height, width) < self.tile:
            raise ValueError(f"{self.name}: frames are {height}x{width}, smaller than a tile of {self.tile}")
        return PatchPlan(size=self.tile).positions(height, width)[0]


class TiledSample(Tiled):
    """Tiles of some frames of a video, chosen by `plan`; their order in time does not matter."""

    plan: PatchPlan

    def outputs(self, frames: Tensor) -> Tensor:
        """The network's output for each tile of those frames."""
        return super().outputs(frames[list(self.plan.frame_indices(len(frames)))])
