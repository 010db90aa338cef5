"""Training steps by the Trainer outside a run, watched: what measurements of training are made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

StepPrecision = Literal["32-true", "bf16-mixed"]
"""The Trainer's precision."""
See = Callable[[str, Tensor], None]
"""Called with "before", "gradient" (not yet clipped) or "weights" (after the step), a space and a weight's name, and
with the whole tensor, which is the Trainer's own."""


def watched_steps(
    task: L.LightningModule,
    batches: list[dict[str, Tensor]],
    folder: Path,
    device: Literal["cpu", "cuda"],
    precision: StepPrecision,
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto",
    devices: int = 1,
    steps: int = 1,
    see: See | None = None,
) -> list[float]:
    """Take equal optimiser steps, with gradients clipped to norm 1; the seconds of each batch.

    Args:
        task: what is trained.
        batches: this process's part of a step; the gradients of several are accumulated.
        folder: for the Trainer's files, of which there should be none.
        device: kind of the devices.
        precision: see StepPrecision.
        strategy: how several processes share the work. Each of them calls this function, in torchrun's environment.
        devices: how many they are.
        steps: number of steps.
        see: receives every trained weight and gradient, put together where they are sharded.
    """
    watch = _Watch(see)
    trainer = L.Trainer(
        devices=devices,
        strategy=ModelParallelStrategy(devices, 1) if strategy == "fsdp2" else strategy,
        accelerator="gpu" if device == "cuda" else "cpu",
        precision=precision,
        max_steps=steps,
        accumulate_grad_batches=len(batches),
        gradient_clip_val=1.0,
        callbacks=[watch],
        use_distributed_sampler=False,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(task, DataLoader(batches * steps, batch_size=None))  # type: ignore[arg-type]  # a list is a dataset
    return watch.seconds


class _Watch(L.Callback):
    """Hands each gradient and each updated weight on, and times the steps."""

    def __init__(self, see: See | None) -> None:
        self.see = see
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        self._began = _now(task.device)

    def on_train_start(self, trainer: Any, task: Any) -> None:
        self._see("before", task)

    def on_before_optimizer_step(self, trainer: Any, task: Any, optimizer: Any) -> None:
        self._see("gradient", task)

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds.append(_now(task.device) - self._began)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._see("weights", task)

    def _see(self, kind: str, task: Any) -> None:
        if self.see is None:
            return
        for name, weight in task.named_parameters():
            if weight.requires_grad:
                tensor = weight.grad if kind == "gradient" else weight.detach()
                # Put together from its shards, in which every process must take part.
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                self.see(f"{kind} {name}", whole)


def _now(device: torch.device) -> float:
    """The time when a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
