"""A small run with everything a resume must restore."""

from __future__ import annotations

import json
import os
import random
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from luve_lightning.callbacks import EMA, AtomicCheckpointIO, Checkpoints, GracefulStop, NaNGuard, RandomState
from luve_lightning.callbacks.training_run import use_one_stream
from luve_lightning.datamodules.base import ResumableDataModule
from luve_lightning.datamodules.sampling import SampleKey
from luve_lightning.tasks.base import TrainingTask


class Crops(Dataset[dict[str, Any]]):
    """Random crops of fixed series: what is drawn follows from the sample's key alone."""

    def __init__(self, items: int = 12) -> None:
        self.series = torch.randn(items, 16, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.series)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        start = int(np.random.default_rng(list(key.seed)).integers(9))
        return {"x": self.series[key.index, start : start + 8], "clip_id": f"clip-{key.index}", "crop": start}


class CropsDataModule(ResumableDataModule):
    """Twelve items (6 batches an epoch), two kinds; validation in the items' order."""

    def __init__(self, num_workers: int = 0, batch_size: int = 2, passes: int = 1) -> None:
        super().__init__(batch_size, num_workers, seed=3)
        self.items, self.passes = Crops(), passes

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(self.items, len(self.items), (1.0, 2.0), self.passes)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.evaluation_loader(torch.utils.data.TensorDataset(self.items.series[:, :8]))  # type: ignore[arg-type]


class CropsTask(TrainingTask):
    """An autoencoder whose steps draw from torch's, numpy's and Python's global generators.

    Args:
        nan_at: optimiser step whose loss is not finite on rank `nan_rank`; -1 never.
        nan_rank: see `nan_at`.
        nan_in: "loss", "gradient" (of a finite loss) or "constant" (an infinite loss with finite gradients).
        fused: train with one kernel for all weights, as on a GPU.
    """

    def __init__(self, nan_at: int = -1, nan_rank: int = 0, nan_in: str = "loss", fused: bool = False) -> None:
        super().__init__(lr=1e-2, min_lr=1e-4, weight_decay=0.1, warmup_steps=3)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.BatchNorm1d(16), nn.Linear(16, 8))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.nan_at, self.nan_rank, self.nan_in, self.fused = nan_at, nan_rank, nan_in, fused

    def configure_optimizers(self) -> Any:
        with patch("luve_lightning.tasks.base.fusible", return_value=self.fused):
            return super().configure_optimizers()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        noise = torch.randn(()) + float(np.random.standard_normal()) + random.gauss(0.0, 1.0)  # noqa: NPY002
        output = self.net(batch["x"] + 0.1 * noise)
        sick = self.global_step == self.nan_at and self.global_rank == self.nan_rank
        if sick and self.nan_in == "loss":
            return output.sum() * torch.nan
        if sick and self.nan_in == "gradient":  # adds 0; the gradient of sqrt at 0 is infinite
            output = output + (output.detach() - output).sqrt()
        loss = (output - batch["x"]).square().mean()
        if sick and self.nan_in == "constant":
            loss = loss + torch.inf
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/error", (self.net(batch[0]) - batch[0]).square().mean(), sync_dist=True)


class Journal(Callback):
    """Appends what each micro-batch trained on, and each validation, to a file a rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _write(self, trainer: L.Trainer, entry: list[Any]) -> None:
        with (self.folder / f"journal-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        crop = batch["crop"].tolist() if "crop" in batch else None
        self._write(trainer, ["train", trainer.current_epoch, batch_idx, list(batch["clip_id"]), crop, rate])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._write(trainer, ["val", float(trainer.callback_metrics["val/error"])])


class SendSignal(Callback):
    """Sends this process a signal when an optimiser step has been taken, on one rank or all."""

    def __init__(self, name: str, at_step: int, rank: int | None = None, in_validation: bool = False) -> None:
        self.number, self.at_step, self.rank = signal.Signals[name], at_step, rank
        self.in_validation = in_validation

    def _send(self, trainer: L.Trainer) -> None:
        if trainer.global_step == self.at_step and self.rank in (None, trainer.global_rank):
            self.at_step = -1
            os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.in_validation:
            self._send(trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self.in_validation and not trainer.sanity_checking:
            self._send(trainer)


class KeepLoaded(Callback):
    """A checkpoint of what a run begins with, written before its first step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


@dataclass(frozen=True)
class Run:
    """One run; `folder` is its default_root_dir."""

    folder: Path
    steps: int = 15
    workers: int = 0
    processes: int = 1
    accumulate: int = 1
    every_n_steps: int = 4
    monitor: str | None = None
    resume: str | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    callbacks: tuple[Callback, ...] = ()

    def with_(self, **changes: Any) -> Run:
        return replace(self, **changes)

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"

    def journal(self, rank: int = 0) -> list[list[Any]]:
        file = self.folder / f"journal-{rank}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def trained(self, rank: int = 0) -> list[list[Any]]:
        """The micro-batches trained on, in order."""
        return [entry for entry in self.journal(rank) if entry[0] == "train"]


def make_trainer(run: Run) -> L.Trainer:
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": run.processes,
        "strategy": "ddp" if run.processes > 1 else "auto",
        "use_distributed_sampler": False,
        "max_steps": run.steps,
        "accumulate_grad_batches": run.accumulate,
        "gradient_clip_val": 1.0,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": run.folder,
        "plugins": AtomicCheckpointIO(),
        **run.trainer,
    }
    own = [
        GracefulStop(),  # first, to show that its place in the list does not matter
        Checkpoints(run.every_n_steps, run.monitor, mode="min"),
        EMA(0.9),
        RandomState(),
        NaNGuard(),
        Journal(run.folder),
    ]
    trainer = L.Trainer(**options, callbacks=[*own, *run.callbacks])
    use_one_stream(trainer.strategy)  # as the command line does
    return trainer


def train(run: Run, task: L.LightningModule | None = None, data: L.LightningDataModule | None = None) -> L.Trainer:
    """Train, and leave the final state in `final.pt` (rank zero)."""
    torch.set_num_threads(1)
    run.folder.mkdir(parents=True, exist_ok=True)
    L.seed_everything(5, verbose=False)
    trainer = make_trainer(run)
    task, data = task or CropsTask(**run.task), data or CropsDataModule(run.workers)
    trainer.fit(task, data, ckpt_path=run.resume)
    if trainer.is_global_zero:
        torch.save(final_state(trainer), run.folder / "final.pt")
    return trainer


def final_state(trainer: L.Trainer) -> dict[str, Any]:
    """Everything that must be the same after a resume."""
    ema = next(c for c in trainer.callbacks if isinstance(c, EMA))  # type: ignore[attr-defined]
    return {
        "weights": {k: v.clone() for k, v in trainer.lightning_module.state_dict().items()},
        "ema": ema.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict()["last_epoch"],
        "torch": torch.get_rng_state(),
        "numpy": float(np.random.standard_normal()),  # noqa: NPY002
        "python": random.random(),
        "step": trainer.global_step,
    }


def load_final(run: Run) -> dict[str, Any]:
    return torch.load(run.folder / "final.pt", weights_only=True)  # type: ignore[no-any-return]


def difference(left: Any, right: Any, path: str = "") -> str | None:
    """Where two nested states differ first, bit by bit; None when they do not."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return None if left.dtype == right.dtype and torch.equal(left, right) else path
    if isinstance(left, dict) and isinstance(right, dict):
        if left.keys() != right.keys():
            return f"{path}: keys {sorted(map(str, left.keys() ^ right.keys()))}"
        return next((d for k in left if (d := difference(left[k], right[k], f"{path}/{k}"))), None)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        if len(left) != len(right):
            return f"{path}: {len(left)} and {len(right)} entries"
        pairs = enumerate(zip(left, right, strict=True))
        return next((d for i, (a, b) in pairs if (d := difference(a, b, f"{path}/{i}"))), None)
    return None if left == right else f"{path}: {left!r} and {right!r}"
