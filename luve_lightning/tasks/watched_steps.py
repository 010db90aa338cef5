"""The Trainer, watched: what it does before the first step, and steps outside a run, for measurements."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from luve_lightning.machine import UnitTimes
from luve_lightning.terminal import Phases

_STEPS = ("run_training_batch", "validation_step", "test_step", "predict_step")  # as the Trainer's profiler names them

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


class Preparing(PassThroughProfiler):
    """Says what a Trainer does until it has taken the first step; nothing is measured after that.

    A profiler, because the Trainer tells its profiler, and nobody else, what it is doing.

    Args:
        trainer: the Trainer whose profiler this will be.
        phases: says it.
    """

    def __init__(self, trainer: L.Trainer, phases: Phases) -> None:
        super().__init__()
        self.trainer, self.phases = trainer, phases
        self._ready = False

    def begin(self) -> None:
        """Called before the Trainer is: it starts the other processes first, and waits for them."""
        count = self.trainer.world_size
        self.phases.begin("setting up" if count == 1 else f"starting {count} processes, each of which loads the model")

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """The processes are there; the loggers are next."""
        super().setup(stage, local_rank, log_dir)
        if not self._ready:
            self.phases.begin("starting the loggers")

    def start(self, action_name: str) -> None:
        """What the Trainer begins."""
        if self._ready:
            return
        kind, _, hook = action_name.rpartition(".")
        if kind.startswith("[LightningDataModule]") and hook == "setup":
            self.phases.begin("looking up clips, latents and captions")
        elif kind.startswith("[LightningModule]") and hook == "configure_model":
            self.phases.begin("distributing the model")
        elif hook == "run_training_epoch":
            self.phases.begin("loading the first batch")
        elif hook in _STEPS and not self.trainer.sanity_checking:
            compiled = any(module._compiled_call_impl is not None for module in self.trainer.lightning_module.modules())
            first = "first step" if hook == _STEPS[0] else "first batch"
            self.phases.begin(f"compiling the blocks ({first})" if compiled else first)

    def stop(self, action_name: str) -> None:
        """What the Trainer has done."""
        if self._ready:
            return
        kind, _, hook = action_name.rpartition(".")
        if kind.startswith("[LightningDataModule]") and hook == "setup":
            self.phases.begin("setting up callbacks")
        elif kind.startswith("[LightningModule]") and hook in ("setup", "configure_model"):
            self.phases.begin(f"moving the model to {self.trainer.strategy.root_device.type}")
        elif kind.startswith("[LightningModule]") and hook == "on_fit_start" and self.trainer.ckpt_path:
            self.phases.begin("resuming from the checkpoint")
        elif hook in _STEPS and not self.trainer.sanity_checking:
            self._ready = True
            self.phases.close("first step done" if hook == _STEPS[0] else "first batch done")


class _Idle(L.LightningModule):
    """Trains as many tensors as the base VLUer, with next to nothing to compute; times its steps."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(8)) for _ in range(49))
        self.average: list[Tensor] = []
        self.times = UnitTimes("step", device)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logs what the first phase of VLUerTask does."""
        loss = torch.cat(list(self.weights)).sub(1).square().mean()
        self.log_dict({"train/latent": loss.detach()})
        self.log("train/phase", 1.0)
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Waits, as callbacks.NaNGuard does before such an AdamW."""
        bool(torch.nn.utils.get_total_norm([weight.grad for weight in self.weights]).isfinite())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """An average, as callbacks.EMA keeps it, and the time."""
        weights = [weight.detach() for weight in self.weights]
        self.average = self.average or [weight.clone() for weight in weights]
        torch._foreach_lerp_(self.average, weights, 0.001)
        self.times.advance()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-6)


def idle_step(device: torch.device, loader: Iterable[Any]) -> float:
    """Median seconds of a training step without a model: Lightning, what every run does besides, AdamW and the batch.

    Args:
        device: that trains.
        loader: of three batches or more.
    """
    log, module = logging.getLogger("lightning.pytorch"), _Idle(device)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = L.Trainer(
                accelerator="gpu" if device.type == "cuda" else "cpu",
                devices=[device.index or 0] if device.type == "cuda" else 1,
                precision="bf16-mixed",
                max_epochs=1,
                gradient_clip_val=1.0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, loader)
    finally:
        log.setLevel(level)
    return float(module.times.record()["seconds_per_unit"])
