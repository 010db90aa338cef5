"""What a resumed run takes from its checkpoint, and what from its configuration.

A checkpoint holds state: weights, moments, averages, positions. Lightning and PyTorch also save settings, and
restore them over the new configuration's. Here the configuration's are put back.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim.lr_scheduler import LambdaLR

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
                    if name != "lr" and group.get(name) != value:  # the schedule's, below
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
