"""Random space-time views of clips: what the VAE trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from luve_lightning.datasets.clips import ClipError, read_clip
from luve_lightning.datasets.quarantine import Quarantine
from luve_lightning.datasets.video_index import ClipEntry
from luve_lightning.functional.pixels import frames_to_video
from luve_lightning.functional.resize import resize_video


@dataclass(frozen=True)
class View:
    """One kind of training crop.

    Attributes:
        frames: frames of the crop, 4k + 1.
        size: height and width of the crop after downscaling, pixels.
        scale: how much the clip is downscaled first, >= 1; the crop covers scale * size source pixels.
        weight: relative frequency.
    """

    frames: int
    size: int
    scale: float = 1.0
    weight: float = 1.0

    @property
    def source_size(self) -> int:
        """Pixels of the clip that the crop covers in each direction."""
        return round(self.size * self.scale)


class ClipViews(Dataset[dict[str, Any]]):
    """Random crops of clips, addressed by `SampleKey`s (index, bucket = view, seed).

    Args:
        entries: clips to draw from.
        views: the kinds of crop, in bucket order.
        quarantine: where unreadable clips are written.
        preload: decode every clip once into memory; for worlds that fit.
        augment: random horizontal flips and time reversals.
    """

    def __init__(
        self,
        entries: Sequence[ClipEntry],
        views: Mapping[str, View],
        quarantine: Quarantine,
        preload: bool = False,
        augment: bool = True,
    ) -> None:
        self.entries, self.views = list(entries), list(views.values())
        self.quarantine, self.augment = quarantine, augment
        self.loaded: dict[int, np.ndarray] = {}
        if preload:
            for i, entry in enumerate(self.entries):
                try:
                    self.loaded[i] = read_clip(entry.path, 0, entry.total_frames)
                except ClipError as error:
                    quarantine.add(error)
            if not self.loaded:
                raise ValueError("no readable clip to train on")

    def __len__(self) -> int:
        return len(self.entries)

    def _frames(self, index: int, start: int, count: int) -> np.ndarray:
        if index in self.loaded:
            return self.loaded[index][start : start + count]
        return read_clip(self.entries[index].path, start, count)

    def _readable(self, index: int, count: int, u: float) -> tuple[int, np.ndarray]:
        """The clip asked for, or the next one that can be read."""
        for step in range(len(self.entries)):
            i = (index + step) % len(self.entries)
            entry = self.entries[i]
            start = int(u * (entry.total_frames - count + 1))
            try:
                if entry.total_frames < count:
                    raise ClipError(entry.path, f"{entry.total_frames} frames, {count} needed")
                return i, self._frames(i, start, count)
            except ClipError as error:
                self.quarantine.add(error)
        raise ValueError("no readable clip left")

    def __getitem__(self, key: Any) -> dict[str, Any]:
        view = self.views[key.bucket]
        rng = np.random.default_rng(list(key.seed))
        index, frames = self._readable(key.index, view.frames, rng.random())
        height, width = frames.shape[1:3]
        side = view.source_size
        if min(height, width) < side:
            raise ValueError(
                f"clip {self.entries[index].clip_id} is {height}x{width}; a view of size {view.size} at scale "
                f"{view.scale} needs {side}x{side} pixels"
            )
        y, x = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        frames = frames[:, y : y + side, x : x + side]
        if self.augment and rng.random() < 0.5:
            frames = frames[:, :, ::-1]
        if self.augment and rng.random() < 0.5:
            frames = frames[::-1]
        video: Tensor = frames_to_video(np.ascontiguousarray(frames))
        if side != view.size:
            video = resize_video(video.unsqueeze(0), (view.size, view.size)).squeeze(0).clamp_(-1, 1)
        return {"video": video, "clip_id": self.entries[index].clip_id}


class WholeClips(Dataset[dict[str, Any]]):
    """The first frames of each clip, uncropped: what validation sees.

    Args:
        entries: clips.
        frames: frames of each, 4k + 1.
        limit: at most this many clips; None takes all.
    """

    def __init__(self, entries: Sequence[ClipEntry], frames: int, limit: int | None = None) -> None:
        self.entries, self.frames = list(entries)[:limit], frames

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        video = frames_to_video(read_clip(entry.path, 0, self.frames))
        return {"video": torch.as_tensor(video), "clip_id": entry.clip_id}
