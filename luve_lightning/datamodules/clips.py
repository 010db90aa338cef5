"""Clips as pixels, for training a VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from luve_lightning.data.clip_views import ClipViews, View, WholeClips
from luve_lightning.data.quarantine import Quarantine
from luve_lightning.data.video_index import ClipEntry, Limits, Split
from luve_lightning.datamodules.base import (
    ResumableDataModule,
    check_clip_limits,
    open_index,
)
from luve_lightning.datamodules.loader import OutlivingLoader


class ClipsDataModule(ResumableDataModule):
    """Random views of training clips; whole clips for validation and test.

    Args:
        index: CSV with UltraVideo's columns.
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
        missing = [split for split in splits if split not in self.entries]
        if not missing:
            return
        index = open_index(self.index_path, self.keep)
        for split in missing:
            self.entries[split] = self.clips_of(index, split)
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
