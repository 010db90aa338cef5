"""The base of every LightningModule here: optimiser, schedule, and checkpoints of trainable weights only."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import nn

from luve_lightning.tasks.resume import Settings, check_training_state, say

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
        betas: AdamW's decays of the first and second moment, each in [0, 1).
    """

    def __init__(
        self, lr: float, min_lr: float, weight_decay: float, warmup_steps: int, betas: tuple[float, float] = (0.9, 0.99)
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
        self.lr, self.min_lr = lr, min_lr
        self.weight_decay, self.warmup_steps = weight_decay, warmup_steps
        self.betas = (betas[0], betas[1])
        self.strict_loading = False
        self._steps = 0  # the run's, once it has an optimiser
        self._settings = Settings()
        self._schedule_before: dict[str, Any] = {}  # from the run that wrote the checkpoint

    def learning_rate(self, step: int, total_steps: int) -> float:
        """Learning rate of an optimiser step: linear warm-up, then a cosine from `lr` to `min_lr`."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))

    def configure_optimizers(self) -> Any:
        """AdamW with a warm-up and a cosine over the run's optimiser steps."""
        trainable = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.lr, betas=self.betas)
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
        """Save only what training changes."""
        keep = self._trainable_keys()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keep}
        checkpoint["trained_weights"] = sorted(keep)
        checkpoint["schedule"] = self._schedule()

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
