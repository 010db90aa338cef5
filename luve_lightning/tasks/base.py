"""The base of every LightningModule here, what a resume checks, and what callbacks and evaluation need of a task.

TrainingTask holds optimiser, schedule, and checkpoints of trainable weights only. Callbacks and evaluation know tasks
by the protocols alone: any LightningModule with these attributes will do.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from luve_lightning.models.backbones import Denoiser, LatentSpace, TextConditioner
from luve_lightning.models.experts import ExpertConfig
from luve_lightning.models.vluer import BaseVLUer
from luve_lightning.tasks.optimizer_states import adamw, fusible, numbered_by_place

_MOST = 1e6  # far above what trains, far below where AdamW's float32 steps overflow


class TrainingTask(L.LightningModule):
    """Base of the training tasks.

    Frozen modules (a VAE, a backbone) are neither saved nor expected in checkpoints. Loading compares the keys
    itself, because Lightning's `strict_loading=False` silently accepts missing ones.

    Args:
        lr: peak learning rate of AdamW, > 0, at most 1e6.
        min_lr: learning rate at the end of the cosine, in [0, lr].
        weight_decay: AdamW's weight decay, for weights of two dimensions or more, at most 1e6.
        warmup_steps: steps of linear warm-up from 0.
        decay_steps: steps at the end over which the cosine falls; before them the learning rate stays at `lr`. Such a
            run can be lengthened: resume a checkpoint from before them with a greater `trainer.max_steps`. None is a
            cosine over all steps after the warm-up.
        betas: AdamW's decays of the first and second moment, each in [0, 1).
    """

    def __init__(
        self,
        lr: float,
        min_lr: float,
        weight_decay: float,
        warmup_steps: int,
        betas: tuple[float, float] = (0.9, 0.99),
        decay_steps: int | None = None,
    ) -> None:
        super().__init__()
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
        if not 0 <= min_lr <= lr or not 0 < lr <= _MOST:
            raise ValueError(f"expected 0 <= min_lr <= lr and 0 < lr <= {_MOST:g}, got lr={lr}, min_lr={min_lr}")
        if warmup_steps < 0 or not 0 <= weight_decay <= _MOST:
            raise ValueError(
                f"expected warmup_steps >= 0 and 0 <= weight_decay <= {_MOST:g}, got {warmup_steps} and {weight_decay}"
            )
        if decay_steps is not None and decay_steps < 1:
            raise ValueError(f"decay_steps: expected at least 1, or null for all after the warm-up, got {decay_steps}")
        self.lr, self.min_lr = lr, min_lr
        self.weight_decay, self.warmup_steps, self.decay_steps = weight_decay, warmup_steps, decay_steps
        self.betas = (betas[0], betas[1])
        self.strict_loading = False
        self._steps = 0  # the run's, once it has an optimiser
        self._settings = Settings()
        self._schedule_before: dict[str, Any] = {}  # from the run that wrote the checkpoint

    def learning_rate(self, step: int, total_steps: int) -> float:
        """Learning rate of an optimiser step: linear warm-up, then `lr`, then a cosine from it to `min_lr`."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / (self.warmup_steps + 1)
        first = self.warmup_steps
        if self.decay_steps is not None:
            first = max(first, total_steps - self.decay_steps)
        progress = max(0, step - first) / max(1, total_steps - first)
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))

    def configure_optimizers(self) -> Any:
        """AdamW with a warm-up and a cosine over the run's optimiser steps."""
        trainable = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
        fused = fusible(self.trainer, trainable)
        optimizer = adamw([group for group in groups if group["params"]], self.lr, self.betas, fused)
        steps = self.trainer.estimated_stepping_batches
        if steps == math.inf:
            raise ValueError(
                "the learning rate falls until the last step, and there is none: give trainer.max_steps or "
                "trainer.max_epochs (trainer.max_time may end the run earlier)"
            )
        total = self._steps = int(steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.learning_rate(step, total) / self.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _schedule(self) -> dict[str, Any]:
        """What the learning rate of a step depends on."""
        return {
            "lr": self.lr,
            "min_lr": self.min_lr,
            "weight_decay": self.weight_decay,
            "warmup_steps": self.warmup_steps,
            "decay_steps": self.decay_steps,
            "steps": self._steps,
        }

    def on_fit_start(self) -> None:
        """Remember the optimiser's settings before a checkpoint replaces them."""
        self._settings.note_optimizers(self.trainer)

    def on_train_start(self) -> None:
        """Restore the configuration's settings in a resumed run, and say which differ from the checkpoint's."""
        changes = self._settings.restore(self.trainer)
        before, now = self._schedule_before, self._schedule()
        differs = {name: (now[name], before[name]) for name in now if name in before and before[name] != now[name]}
        say(changes | differs)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Log which bucket a step used, where the data have several; the run's first lines say what each is."""
        if isinstance(batch, dict) and "bucket" in batch:
            self.log("train/bucket", batch["bucket"][0].float())

    def _trainable_keys(self) -> set[str]:
        frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
        frozen_modules = {f"{prefix}." for prefix, module in self.named_modules() if prefix and _is_frozen(module)}
        return {k for k in self.state_dict() if k not in frozen and not k.startswith(tuple(frozen_modules))}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save only what training changes, in a form that a run of sharded weights takes, too."""
        keep = self._trainable_keys()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keep}
        checkpoint["trained_weights"] = sorted(keep)
        checkpoint["schedule"] = self._schedule()
        states = checkpoint.get("optimizer_states", ())
        if states and self.device_mesh is None:  # else the strategy has done it
            pairs = zip(states, self.trainer.optimizers, strict=True)
            checkpoint["optimizer_states"] = [numbered_by_place(state, optimizer, self) for state, optimizer in pairs]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, naming what differs, or one that training cannot continue from."""
        # A strategy that shards weights has taken them out of the checkpoint, and left what does not fit.
        names = checkpoint["state_dict"] if "state_dict" in checkpoint else checkpoint["trained_weights"]
        expected, found = self._trainable_keys(), set(names)
        if expected != found:
            missing, extra = sorted(expected - found), sorted(found - expected)
            raise ValueError(
                f"checkpoint does not fit {type(self).__name__}: "
                f"{len(missing)} weights missing ({', '.join(missing[:3])}), "
                f"{len(extra)} unexpected ({', '.join(extra[:3])})"
            )
        own = self.state_dict()
        for name, weight in checkpoint.get("state_dict", {}).items():
            if weight.shape != own[name].shape:
                raise ValueError(
                    f"checkpoint does not fit {type(self).__name__}: {name} has shape {tuple(weight.shape)} there, "
                    f"{tuple(own[name].shape)} here"
                )
        trainer = self._trainer
        if trainer is not None and trainer.state.fn == "fit":
            check_training_state(trainer, checkpoint)
            self._settings.note_callbacks(trainer)
            self._schedule_before = checkpoint.get("schedule", {})


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


_SHOWN, _LONGEST = 8, 60
Change = tuple[Any, Any]  # the configuration's value, the checkpoint's


def check_training_state(trainer: L.Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Refuse to resume from weights alone, and name what else the checkpoint lacks.

    Raises:
        ValueError: when the optimiser's state, the schedule's or the loops' is missing.
    """
    wanted = {"loops": "the step", "lr_schedulers": "the schedule's state"}
    if trainer.strategy.lightning_restore_optimizer:
        wanted["optimizer_states"] = "the optimiser's state"
    lacking = [what for key, what in wanted.items() if not checkpoint.get(key)]
    for state in checkpoint.get("optimizer_states", ()):
        if not state.get("state") and checkpoint.get("global_step"):
            lacking.append("the optimiser's moments")
    if lacking:
        raise ValueError(
            f"checkpoint {trainer.ckpt_path} cannot be resumed: it lacks {', '.join(lacking)}; expected a last.ckpt or "
            "best-*.ckpt that `luve fit` wrote"
        )
    saved, anew = checkpoint.get("callbacks") or {}, []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        stateful = type(callback).state_dict is not L.Callback.state_dict and callback.state_dict()
        if stateful and callback.state_key not in saved:
            anew.append(type(callback).__name__)
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    stateful = data is not None and type(data).state_dict is not L.LightningDataModule.state_dict
    if stateful and type(data).__qualname__ not in checkpoint:
        anew.append(type(data).__name__)
    if anew:
        rank_zero_warn(f"the checkpoint has no state of {', '.join(anew)}: it starts afresh")


class Settings:
    """The configuration's settings of optimisers, schedules and callbacks, before a checkpoint is loaded into them."""

    def __init__(self) -> None:
        self.callbacks: list[tuple[L.Callback, dict[str, Any]]] = []
        self.groups: list[list[dict[str, Any]]] = []
        self.rates: list[list[float]] = []

    def note_callbacks(self, trainer: L.Trainer) -> None:
        """Remember the callbacks' settings before their states are loaded."""
        self.callbacks = [(callback, _settings_of(callback)) for callback in trainer.callbacks]  # type: ignore[attr-defined]

    def note_optimizers(self, trainer: L.Trainer) -> None:
        """Remember the settings of optimisers and schedules before their states are loaded."""
        self.groups = [
            [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]
        self.rates = [[float(rate) for rate in config.scheduler.base_lrs] for config in trainer.lr_scheduler_configs]

    def restore(self, trainer: L.Trainer) -> dict[str, Change]:
        """Put back everything that a checkpoint has changed.

        Returns:
            The changed settings, by name.

        Raises:
            ValueError: for another learning rate with a schedule that continues from its last one.
        """
        changes: dict[str, Change] = {}
        for callback, settings in self.callbacks:
            for name, value in settings.items():
                if getattr(callback, name) != value:
                    changes[f"{type(callback).__name__}.{name}"] = value, getattr(callback, name)
                    setattr(callback, name, value)
        for optimizer, groups in zip(trainer.optimizers, self.groups, strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                for name, value in settings.items():
                    if name != "lr" and _plain(group.get(name)) != _plain(value):  # the schedule's, below
                        changes["lr" if name == "initial_lr" else name] = value, group.get(name)
                        group[name] = value
        for config, rates in zip(trainer.lr_scheduler_configs, self.rates, strict=True):
            schedule: Any = config.scheduler
            if isinstance(schedule, LambdaLR):
                schedule.base_lrs = list(rates)
                lambdas = zip(rates, schedule.lr_lambdas, strict=True)
                schedule._last_lr = [rate * function(schedule.last_epoch) for rate, function in lambdas]
                for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
                    group["lr"] = rate
            elif list(schedule.base_lrs) != rates:
                raise ValueError(
                    f"lr: {type(schedule).__name__} goes on with {schedule.base_lrs} of the checkpoint, got {rates}: "
                    "resume with the same"
                )
        return changes


def _plain(value: Any) -> Any:
    """A sharded checkpoint gives pairs back as lists."""
    return tuple(value) if isinstance(value, list) else value


def _settings_of(callback: L.Callback) -> dict[str, Any]:
    """A callback's arguments that it keeps under their own names, plain values only."""
    names = inspect.signature(type(callback).__init__).parameters
    return {
        name: value
        for name, value in vars(callback).items()
        if name in names and isinstance(value, bool | int | float | str)
    }


def say(changes: Mapping[str, Change]) -> None:
    """Say in one line what a resumed run does differently from the run that wrote the checkpoint."""
    if changes:
        parts = [f"{name} {_text(new)} (the checkpoint had {_text(old)})" for name, (new, old) in changes.items()]
        more = f", and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
        rank_zero_info(f"resuming with {', '.join(parts[:_SHOWN])}{more}")


def _text(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        value = str(value["class_path"]).rpartition(".")[2]
    text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def keeps(task: object, contract: type[Any]) -> bool:
    """Whether a task has every attribute of one of the protocols below.

    From Python 3.12 on, `isinstance` would not find a module's submodules: it looks past `nn.Module.__getattr__`.
    """
    names = (name for kind in contract.__mro__ for name in (*inspect.get_annotations(kind), *vars(kind)))
    return all(hasattr(task, name) for name in names if not name.startswith("_"))


class Exporting(Protocol):
    """A trained model that saves itself in its own format; for `Export`.

    A task whose export needs every process sets `collective_export = True`.
    """

    def export(self, folder: Path, datamodule: Any) -> None:
        """Write into an existing folder."""


class Denoising(Protocol):
    """Generates from caption embeddings; for `GeneratedVideos`.

    Attributes:
        transformer: a backbone's transformer, with or without experts.
        denoiser: the denoiser of it.
        shift: shift of the schedule that it was trained for.
        device: device of the transformer.
    """

    transformer: nn.Module
    denoiser: Denoiser
    shift: float
    device: torch.device

    def text(self, batch: dict[str, Any]) -> Tensor:
        """Caption embeddings of a batch, B x L x D."""


class TextToVideo(Denoising, Protocol):
    """Generates from captions; for `DenoisingSpectra`.

    Attributes:
        text_encoder: embeds them.
        backbone: folder with the VAE whose latents it generates.
    """

    text_encoder: TextConditioner
    backbone: Path


class Upsampling(Protocol):
    """Upsamples latents; for `UpsamplerComparison`, `SampleStrips` and `UpsampledVideos`.

    Attributes:
        net: the upsampler.
        codec: the latents' codec.
        device: device of both.
    """

    net: BaseVLUer
    codec: LatentSpace
    device: torch.device


class ExpertComparison(Protocol):
    """Has compared an expert with its base in `trainer.test`; for `ExpertLosses`.

    Attributes:
        name: name of the expert.
        expert: configuration of the expert.
        comparison: mean loss without and with the expert, by clip.
    """

    name: str
    expert: ExpertConfig
    comparison: Mapping[str, tuple[float, float]]
