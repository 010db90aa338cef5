"""Random space-time crops of clips, for training the VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from luve_lightning.data.clip_container import ClipError
from luve_lightning.data.clip_windows import ClipWindow, EncodeItem, WindowReader, pending_windows, plan_windows
from luve_lightning.data.clips import read_clip
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.latent_store import LatentRecipe, LatentStore
from luve_lightning.data.quarantine import Quarantine, first_readable
from luve_lightning.data.video_index import ClipEntry, Limits, Split
from luve_lightning.datamodules.base import OutlivingLoader, ResumableDataModule, check_clip_limits, open_index
from luve_lightning.datamodules.buckets import Bucket
from luve_lightning.functional.pixels import frames_to_video, resize_video
from luve_lightning.machine import check_workers
from luve_lightning.terminal import amount


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
        """Pixels of the clip that the crop covers along each axis."""
        return round(self.size * self.scale)


def augmented(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random symmetry of the pictures: mirrored, transposed, backwards in time, with other colours or contrast.

    For a world of few photographs: an autoencoder should learn pictures, not these pictures.

    Args:
        frames: uint8, T x H x W x 3, square.
        rng: decides.

    Returns:
        uint8, the same shape.
    """
    if rng.random() < 0.5:
        frames = frames[:, :, ::-1]
    if rng.random() < 0.5:
        frames = frames[::-1]
    if rng.random() < 0.5:
        frames = frames.transpose(0, 2, 1, 3)
    if rng.random() < 0.5:
        frames = frames[..., rng.permutation(3)]
    if rng.random() < 0.5:
        gain, level = rng.uniform(0.5, 1.3), rng.uniform(0, 255)
        table = np.clip((np.arange(256) - level) * gain + level, 0, 255).astype(np.uint8)
        frames = table[frames]
    # Not `ascontiguousarray`: one reversed frame counts as contiguous, with a stride that torch refuses.
    return frames.copy()


class ClipViews(Dataset[dict[str, Any]]):
    """Random crops of clips, addressed by `SampleKey`s (index, kind = view, seed).

    Args:
        entries: clips to draw from.
        views: kinds of crop, in order.
        quarantine: records unreadable clips.
        preload: decode every clip once into memory, for worlds that fit.
        augment: see `augmented`.
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
        self.unreadable: dict[int, str] = {}
        for i, entry in enumerate(self.entries if preload else ()):
            try:
                self.loaded[i] = read_clip(entry.path, 0, entry.total_frames, matte=entry.matte)
            except ClipError as error:
                self.unreadable[i] = error.reason
                quarantine.add(error)

    def __len__(self) -> int:
        return len(self.entries)

    def _read(self, index: int, count: int, seed: Sequence[int]) -> np.ndarray:
        """`count` consecutive frames from a random place; the same seed gives a replacement clip its own place."""
        entry = self.entries[index]
        if entry.total_frames < count or index in self.unreadable:
            reason = self.unreadable.get(index, f"{amount(entry.total_frames, 'frame')}, {count} needed")
            raise ClipError(entry.path, reason)
        start = int(np.random.default_rng([*seed, 1]).integers(entry.total_frames - count + 1))
        if index in self.loaded:
            return self.loaded[index][start : start + count]
        return read_clip(entry.path, start, count, matte=entry.matte)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        view = self.views[key.kind]
        rng = np.random.default_rng(list(key.seed))
        index, frames = first_readable(
            key.index, len(self), lambda i: self._read(i, view.frames, key.seed), self.quarantine
        )
        height, width = frames.shape[1:3]
        side = view.source_size
        if min(height, width) < side:
            raise ValueError(
                f"clip {self.entries[index].clip_id} is {height}x{width}; a view of size {view.size} at scale "
                f"{view.scale} needs {side}x{side} pixels"
            )
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        frames = frames[:, top : top + side, left : left + side]
        if self.augment:
            frames = augmented(frames, rng)
        video: Tensor = frames_to_video(frames)
        if side != view.size:
            video = resize_video(video.unsqueeze(0), (view.size, view.size)).squeeze(0).clamp_(-1, 1)
        return {"video": video, "clip_id": self.entries[index].clip_id}


class WholeClips(Dataset[dict[str, Any]]):
    """The first frames of each clip, uncropped, for validation.

    Args:
        entries: clips.
        frames: frames per clip, 4k + 1.
        limit: at most this many clips; None takes all.
    """

    def __init__(self, entries: Sequence[ClipEntry], frames: int, limit: int | None = None) -> None:
        self.entries, self.frames = list(entries)[:limit], frames

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        video = frames_to_video(read_clip(entry.path, 0, self.frames, matte=entry.matte))
        return {"video": torch.as_tensor(video), "clip_id": entry.clip_id}


class ClipsDataModule(ResumableDataModule):
    """Random views of training clips; whole clips for validation and test.

    Args:
        index: UltraVideo's CSV, or an index that luve index made.
        views: kinds of training crop by name; each batch uses one.
        val_frames: frames of each validation clip.
        val_limit: at most this many validation clips.
        passes: visits of each clip per epoch.
        preload: keep decoded training clips in memory.
        max_bad_fraction: stop when more than this share of the clips cannot be read; two are always allowed,
            unless it is 0.
        quarantine: JSON-lines file of unreadable clips; None writes none.
        keep: which clips of the index to take.
        batch_size: see ResumableDataModule.
        num_workers: see ResumableDataModule.
        seed: see ResumableDataModule.
    """

    def __init__(
        self,
        index: Path,
        views: dict[str, View],
        val_frames: int = 9,
        val_limit: int | None = None,
        passes: int = 1,
        preload: bool = False,
        max_bad_fraction: float = 0.05,
        quarantine: Path | None = None,
        keep: Limits = Limits(),  # noqa: B008  # frozen
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if not views:
            raise ValueError("views: expected at least one")
        self.keep = keep
        self.index_path, self.views = Path(index), views
        check_clip_limits(val_limit=val_limit)
        self.val_frames, self.val_limit = val_frames, val_limit
        self.passes, self.preload = passes, preload
        self.max_bad_fraction, self.quarantine_path = max_bad_fraction, quarantine
        self.entries: dict[str, list[ClipEntry]] = {}

    def open_splits(self, *splits: Split) -> None:
        """Read the index and, if training keeps the clips in memory, the clips."""
        missing = self.unopened(splits, self.entries)
        if not missing:
            return
        index = open_index(self.index_path, self.keep)

        def find(split: Split) -> None:
            self.entries[split] = self.clips_of(index, split)

        self.look_up(index, missing, find)
        if "train" in missing:
            train = self.entries["train"]
            quarantine = Quarantine(self.quarantine_path, self.max_bad_fraction, len(train))
            self.train_views = ClipViews(train, self.views, quarantine, self.preload)

    def clip_counts(self) -> dict[str, int]:
        """Clips of each split; see ResumableDataModule."""
        counts = {split: len(entries) for split, entries in self.entries.items()}
        if self.val_limit is not None and "val" in counts:
            counts["val"] = min(counts["val"], self.val_limit)
        return counts

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of {"video": B x 3 x T x H x W, "clip_id"}, one view per batch."""
        weights = [view.weight for view in self.views.values()]
        return self.training_loader(self.train_views, len(self.train_views), weights, self.passes)

    def statistics_dataloader(self) -> DataLoader[Any]:
        """All whole training clips, the same on every process, for measuring latent statistics."""
        # After a test, which opens only its own split.
        entries = self.entries.get("train") or self.clips_of(open_index(self.index_path, self.keep), "train")
        return OutlivingLoader(WholeClips(entries, self.val_frames), num_workers=min(self.num_workers, 4))

    def val_dataloader(self) -> DataLoader[Any]:
        """Whole held-out clips."""
        return self.evaluation_loader(WholeClips(self.entries["val"], self.val_frames, self.val_limit))

    def test_dataloader(self) -> DataLoader[Any]:
        """Whole test clips."""
        return self.evaluation_loader(WholeClips(self.entries["test"], self.val_frames))


class ClipsToEncode(Dataset[list[EncodeItem]]):
    """Batches of windows, decoded.

    Args:
        windows: windows to encode, in order.
        batch_size: windows per batch.
        read: decodes a window.
        batches: length of the dataset; empty batches follow the last window.
    """

    def __init__(self, windows: Sequence[ClipWindow], batch_size: int, read: WindowReader, batches: int) -> None:
        self.windows, self.batch_size, self.read, self.batches = list(windows), batch_size, read, batches

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> list[EncodeItem]:
        if not 0 <= index < self.batches:
            raise IndexError(f"batch {index} of {self.batches}")
        start = index * self.batch_size
        return [self.read(window) for window in self.windows[start : start + self.batch_size]]


class EncodeDataModule(L.LightningDataModule):
    """Shares the windows that lack latents among the processes of a Trainer.

    The Trainer must not shard again (`use_distributed_sampler=False`): every process gets its own dataset and the
    same number of batches (some may be empty), so that all reach the end of the loop and its hooks.

    Args:
        windows: every window that needs latents, in the same order in every process.
        read: decodes a window; knows the recipe and the store.
        batch_size: windows per batch, at least 1.
        num_workers: processes that decode; 0 decodes between the encodes.
    """

    def __init__(self, windows: Sequence[ClipWindow], read: WindowReader, batch_size: int, num_workers: int) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ValueError(f"expected batch_size >= 1 and num_workers >= 0, got {batch_size} and {num_workers}")
        check_workers("num_workers", num_workers)
        self.windows, self.read = list(windows), read
        self.batch_size, self.num_workers = batch_size, num_workers
        self.shard: list[ClipWindow] = []
        self.batches = 0

    def setup(self, stage: str) -> None:
        """Find the windows that are left, once, in one process: entries appear while the others would look."""
        assert self.trainer is not None
        strategy = self.trainer.strategy
        left = pending_windows(self.windows, self.read) if strategy.is_global_zero else []
        pending = [self.windows[position] for position in strategy.broadcast(left)]
        self.shard, self.batches = share(pending, self.trainer.global_rank, self.trainer.world_size, self.batch_size)

    def predict_dataloader(self) -> DataLoader[list[EncodeItem]]:
        """Batches of this process's share."""
        dataset = ClipsToEncode(self.shard, self.batch_size, self.read, self.batches)
        # A process forked from one that uses a GPU cannot use it.
        context = "spawn" if self.read.hardware and self.num_workers else None
        return OutlivingLoader(
            dataset,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            multiprocessing_context=context,
        )

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Leave the frames on the CPU: the task moves and converts one clip at a time."""
        return batch


@dataclass(frozen=True)
class EncodeShare:
    """One bucket's part of a run that encodes.

    Attributes:
        bucket: size and length of the windows.
        planned: the windows of its clips.
        read: decodes them, and knows their recipe and store.
    """

    bucket: Bucket
    planned: list[ClipWindow]
    read: WindowReader

    @classmethod
    def of(
        cls,
        bucket: Bucket,
        clips: Sequence[ClipEntry],
        recipe: LatentRecipe,
        store: LatentStore,
        hashes: ClipHashes,
        hardware: str | None,
    ) -> EncodeShare:
        """The bucket's windows of these clips."""
        own = bucket.recipe(recipe)
        return cls(bucket, plan_windows(clips, own)[0], WindowReader(own, store, hashes, hardware))

    @property
    def clips(self) -> dict[Path, None]:
        """The files that have a window, each once."""
        return dict.fromkeys(window.clip.path for window in self.planned)


def share(windows: Sequence[ClipWindow], rank: int, world_size: int, batch_size: int) -> tuple[list[ClipWindow], int]:
    """One process's windows, and the number of batches that every process must go through.

    Args:
        windows: windows of all processes.
        rank: rank of this process, in [0, world_size).
        world_size: number of processes.
        batch_size: windows per batch.
    """
    return list(windows[rank::world_size]), -(-len(windows[::world_size]) // batch_size)


def _as_it_is(batch: list[EncodeItem]) -> list[EncodeItem]:
    return batch
