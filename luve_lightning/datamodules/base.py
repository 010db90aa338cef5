"""What the training DataModules share: loaders that resume exactly where a run stopped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from luve_lightning.datamodules.sampling import ResumableBatchSampler


class ResumableDataModule(L.LightningDataModule):
    """A DataModule whose training order is a function of (seed, epoch, step) and is part of the checkpoint.

    Run it with `Trainer(use_distributed_sampler=False)`: the batch sampler already shards over processes.

    Args:
        batch_size: samples a batch on one process.
        num_workers: loader processes; 0 loads in the training process.
        seed: of every random choice this module makes, >= 0.
    """

    def __init__(self, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        if seed < 0 or num_workers < 0 or batch_size < 1:
            raise ValueError(
                f"expected batch_size >= 1, num_workers >= 0, seed >= 0; got {batch_size}, {num_workers}, {seed}"
            )
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._resume_batch = 0

    def training_loader(
        self, dataset: Dataset[Any], num_items: int, bucket_weights: Sequence[float] = (1.0,), passes: int = 1
    ) -> DataLoader[Any]:
        """The loader of the training split; starts where the loaded checkpoint stopped."""
        trainer = self.trainer
        sampler = ResumableBatchSampler(
            num_items,
            self.batch_size,
            self.seed,
            bucket_weights,
            passes,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )
        sampler.resume_at(self._resume_batch % len(sampler))
        self._resume_batch = 0
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # The loader draws a base seed for its workers at each epoch; its own generator keeps that draw out of
            # the global one, whose state a resumed run must find unchanged.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def evaluation_loader(self, dataset: Dataset[Any], batch_size: int = 1) -> DataLoader[Any]:
        """A loader in the dataset's own order, sharded over processes by taking every n-th item."""
        trainer = self.trainer
        if trainer is not None and trainer.world_size > 1:
            size = len(dataset)  # type: ignore[arg-type]
            dataset = torch.utils.data.Subset(dataset, range(trainer.global_rank, size, trainer.world_size))
        return DataLoader(
            dataset,
            batch_size=batch_size,
            num_workers=min(self.num_workers, 4),
            generator=torch.Generator().manual_seed(self.seed),
        )

    def state_dict(self) -> dict[str, Any]:
        """Batches of the current epoch that training has taken from this module."""
        if self.trainer is None:
            return {"batches": self._resume_batch}
        # `processed`, not `completed`: at the time of saving, `completed` is one behind.
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        done = progress.current.processed
        return {"batches": 0 if progress.is_last_batch else done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember where to start; used by the next training loader."""
        self._resume_batch = int(state["batches"])
