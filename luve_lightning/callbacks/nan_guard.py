"""Stopping at the first loss or gradient that is not finite."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from luve_lightning.machine import gather_mappings


class NonFiniteLoss(ValueError):
    """Raised when a loss or gradient is inf or nan; the weights are those before the step."""


class NaNGuard(L.Callback):
    """Stops the run when a loss or the gradient norm is not finite, checked before each optimiser step on all ranks.

    The check reads one flag from the device per optimiser step, so no step with nan is ever taken: some steps
    later the weights, the moments and their average would be damaged, and perhaps saved. Reading it waits for the
    backward pass, which costs the time to launch one optimiser step. All ranks agree and raise together; an
    exception on one rank alone would leave the others waiting.

    `<default_root_dir>/nan-<step>.json` holds, for each rank, the clips of the step's micro-batches and their
    losses as they enter the backward pass (divided by `accumulate_grad_batches`). With fp16, gradients may
    overflow and the loss scaler skips such steps; then only losses are checked.
    """

    def __init__(self) -> None:
        self._batches: list[dict[str, Any]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the previous fit."""
        self._batches = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the clips of the coming loss."""
        ids = batch.get("clip_id") if isinstance(batch, Mapping) else None
        self._batches.append({"batch": batch_idx, "clip_ids": [str(i) for i in ids] if ids is not None else None})

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Keep the loss on its device."""
        self._batches[-1]["loss"] = loss.detach()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check, and stop with one error on rank zero.

        Raises:
            NonFiniteLoss: on rank zero; the other ranks leave quietly.
        """
        batches = [batch for batch in self._batches if "loss" in batch]  # a training step may return no loss
        self._batches = []
        if not batches:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            gradients = []
        losses = torch.stack([batch["loss"].float() for batch in batches])
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else losses.new_zeros(())
        finite = bool(losses.isfinite().all() & norm.isfinite())
        if not trainer.strategy.reduce_boolean_decision(not finite, all=False):
            return
        own = {
            "rank": trainer.global_rank,
            "batches": [{**batch, "loss": _number(batch["loss"])} for batch in batches],
            "gradient_norm": _number(norm),
            "non_finite_gradients": [
                name
                for name, p in pl_module.named_parameters()
                if p.grad is not None and not bool(p.grad.isfinite().all())
            ],
        }
        ranks = list(gather_mappings({trainer.global_rank: own}).values())
        if not trainer.is_global_zero:
            raise SystemExit(0)  # see StopRequested
        logged = {name: _number(value) for name, value in trainer.callback_metrics.items()}
        raise NonFiniteLoss(_report(trainer, ranks, logged))


def _report(trainer: L.Trainer, ranks: list[dict[str, Any]], logged: dict[str, Any]) -> str:
    """Write the file; returns the error line."""
    step = trainer.global_step
    bad = [
        (rank["rank"], batch)
        for rank in ranks
        for batch in rank["batches"]
        if isinstance(batch["loss"], str)  # _number writes inf and nan as text
    ]
    if bad:
        rank, batch = bad[0]
        what = f"the loss is {batch['loss']} on rank {rank} for clips {', '.join(batch['clip_ids'] or ['unknown'])}"
    else:
        what = f"the gradient's norm is {ranks[0]['gradient_norm']} (all losses are finite)"
    message = f"step {step}: {what}; the step was not taken"
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        path = Path(trainer.default_root_dir) / f"nan-{step}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"step": step, "epoch": trainer.current_epoch, "error": message, "ranks": ranks, "logged": logged}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        message += f"; see {path}"
    return message


def _number(value: Tensor | float) -> float | str:
    """A float as JSON can hold it: inf and nan as text."""
    number = float(value)
    return number if math.isfinite(number) else str(number)
