"""Exponential moving average of the trainable weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class EMA(L.Callback):
    """Averages trainable weights after each optimiser step; validation, test and export use the average.

    Lightning's own WeightAveraging copies the whole module, frozen backbone included, and saves it in the
    checkpoint; this keeps only trainable weights.

    Args:
        decay: decay of the average, in [0, 1). The effective decay warms up as (1 + n) / (10 + n).
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self._last_step = 0
        self._kept: dict[str, Tensor] = {}

    def _trainable(self, module: L.LightningModule) -> dict[str, Tensor]:
        return {name: p.data for name, p in module.named_parameters() if p.requires_grad}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with the current weights, or with the checkpoint's average.

        Raises:
            ValueError: when the weights are sharded; each process holds another part of them.
        """
        weights = self._trainable(pl_module)
        if any(isinstance(w, DTensor) for w in weights.values()):
            raise ValueError(
                "weights sharded by ModelParallelStrategy cannot be averaged: remove the EMA callback"
            )
        if set(self.average) != set(weights):
            self.average = {name: w.detach().float().clone() for name, w in weights.items()}
        self.average = {name: a.to(weights[name].device) for name, a in self.average.items()}
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the weights of a completed step to the average."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = self._trainable(pl_module)
        averages = [self.average[name] for name in weights]
        torch._foreach_lerp_(averages, [w.float() for w in weights.values()], 1 - decay)

    @contextmanager
    def averaged(self, pl_module: L.LightningModule) -> Iterator[None]:
        """The module holds the averaged weights inside this context; contexts may be nested."""
        if not self.average or self._kept:
            yield
            return
        self._enter(pl_module)
        try:
            yield
        finally:
            self._leave(pl_module)

    def _enter(self, pl_module: L.LightningModule) -> None:
        if not self.average or self._kept:
            return
        weights = self._trainable(pl_module)
        self._kept = {name: w.clone() for name, w in weights.items()}
        for name, w in weights.items():
            w.copy_(self.average[name])

    def _leave(self, pl_module: L.LightningModule) -> None:
        kept, self._kept = self._kept, {}
        for name, w in self._trainable(pl_module).items():
            if name in kept:
                w.copy_(kept[name])

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate the average."""
        self._enter(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Continue training with the weights themselves."""
        self._leave(pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Test the average."""
        self._enter(pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the weights."""
        self._leave(pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Restore the weights after a failed validation or test."""
        self._leave(pl_module)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the weights themselves, even while the module holds the average."""
        checkpoint["state_dict"] |= self._kept

    def state_dict(self) -> dict[str, Any]:
        """The average and the number of steps in it."""
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a checkpoint's average."""
        self.average, self.updates = dict(state_dict["average"]), int(state_dict["updates"])


def averaged_weights(trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
    """The context in which `pl_module` holds the run's averaged weights, if the run keeps an average."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EMA):
            return callback.averaged(pl_module)
    return EMA().averaged(pl_module)
