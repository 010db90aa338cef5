"""The windows that one process of `luve precompute` encodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Dataset

from luve_lightning.data.clip_windows import ClipWindow, EncodeItem, WindowReader, pending_windows
from luve_lightning.datamodules.loader import OutlivingLoader
from luve_lightning.machine import check_workers


class ClipsToEncode(Dataset[list[EncodeItem]]):
    """Batches of windows, decoded.

    Args:
        windows: what to encode, in order.
        batch_size: windows a batch.
        read: decodes a window.
        batches: length of the dataset; empty batches make up what the windows do not fill.
    """

    def __init__(
        self, windows: Sequence[ClipWindow], batch_size: int, read: WindowReader, batches: int
    ) -> None:
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

    def __init__(
        self,
        windows: Sequence[ClipWindow],
        read: WindowReader,
        batch_size: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ValueError(
                f"expected batch_size >= 1 and num_workers >= 0, got {batch_size} and {num_workers}"
            )
        check_workers("num_workers", num_workers)
        self.windows, self.read = list(windows), read
        self.batch_size, self.num_workers = batch_size, num_workers
        self.shard: list[ClipWindow] = []
        self.batches = 0

    def setup(self, stage: str) -> None:
        """Find the windows that are left, once, in one process: entries appear while the others would look."""
        assert self.trainer is not None
        strategy = self.trainer.strategy
        left: list[int] = []
        if strategy.is_global_zero:
            left = pending_windows(self.windows, self.read)
        pending = [self.windows[position] for position in strategy.broadcast(left)]
        self.shard, self.batches = share(
            pending, self.trainer.global_rank, self.trainer.world_size, self.batch_size
        )

    def predict_dataloader(self) -> DataLoader[list[EncodeItem]]:
        """Batches of this process's share."""
        dataset = ClipsToEncode(self.shard, self.batch_size, self.read, self.batches)
        return OutlivingLoader(
            dataset,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
        )

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Leave the frames on the CPU: the task moves and converts one clip at a time."""
        return batch


def share(
    windows: Sequence[ClipWindow], rank: int, world_size: int, batch_size: int
) -> tuple[list[ClipWindow], int]:
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
