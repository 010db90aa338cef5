"""Stopping a run: at a signal with everything saved, and at the first loss or gradient that is not finite."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from luve_lightning.callbacks.checkpoints import Checkpoints, accumulating
from luve_lightning.machine import gather_mappings
from luve_lightning.tasks.optimizer_states import StepMark, skips_marked


class StopRequested(SystemExit):
    """Leaves the Trainer and the program after a signal; the run can be resumed.

    The exit status is 128 + the signal's number (143 for SIGTERM, 130 for SIGINT), the shell's convention, so that
    `make` and job scripts do not take a stopped run for a finished one. Other ranks leave with 0: rank zero speaks
    for the run, and Lightning's launcher kills rank zero when a child reports a failure.

    Attributes:
        told: what was saved and how to continue, in one line, printed by whoever ends the program: a line printed
            here would be overdrawn by a progress bar.
    """

    def __init__(self, code: int, told: str = "") -> None:
        super().__init__(code)
        self.told = told


class GracefulStop(L.Callback):
    """At a signal: finish the optimiser step, write `last.ckpt`, leave.

    Lightning's own handler broadcasts inside the handler, which hangs unless every process gets the signal. Here
    the handler sets a flag; after each optimiser step all ranks agree, so one signal to one rank is enough.
    Nothing else runs after it: no validation, no export. During validation a single process stops after the
    current batch; several processes stop after the validation, because their numbers of batches may differ.

    A second SIGINT (Ctrl-C) interrupts at once, without saving. This also replaces Lightning's automatic
    requeueing under SLURM: let the job script requeue when the exit status is above 128.

    Args:
        signals: names of the signals to handle. `sbatch --signal=USR1@120` sends SIGUSR1 ahead of the limit.
        every_n_steps: optimiser steps from one time that several processes agree to the next. Agreeing waits for the
            device, which a step of milliseconds feels.
    """

    def __init__(self, signals: Sequence[str] = ("SIGTERM", "SIGINT", "SIGUSR1"), every_n_steps: int = 1) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps: expected at least 1, got {every_n_steps}")
        unknown = [name for name in signals if name not in signal.Signals.__members__]
        if unknown or not signals:
            raise ValueError(f"signals: expected names such as SIGTERM, got {unknown or 'none'}")
        self.signals, self.every_n_steps = [signal.Signals[name] for name in signals], every_n_steps
        self._received = 0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this process got a signal; long work should then give way."""
        return bool(self._received)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Run after every other callback: the checkpoint must hold what they did in this step."""
        # A new list, because Lightning is iterating over the old one.
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [c for c in callbacks if c is not self] + [self]  # type: ignore[attr-defined]

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signals; this is the first hook after Lightning took them."""
        self._take_over()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signals if there was no sanity check."""
        self._take_over()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signals: a resumed run may validate before it trains."""
        if _fitting(trainer):
            self._take_over()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if asked to."""
        if trainer.world_size == 1 or trainer.global_step % self.every_n_steps == 0:
            self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Leave a long validation before the time until the kill is used up; nothing is written in its middle."""
        written = any(isinstance(c, Checkpoints) and c.is_current(trainer) for c in trainer.checkpoint_callbacks)
        if _fitting(trainer) and trainer.world_size == 1 and written:
            self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop before the next step."""
        if _fitting(trainer):
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signals back."""
        self._give_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._give_back()

    def _take_over(self) -> None:
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        self._received = 0
        self._previous = {number: signal.signal(number, self._note) for number in self.signals}

    def _give_back(self) -> None:
        previous, self._previous = self._previous, {}
        for number, handler in previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received:
            raise KeyboardInterrupt
        self._received = number

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        if accumulating(trainer):
            return
        number = self._received
        if trainer.world_size > 1:  # a single process need not read anything back from the device
            received = torch.tensor(number, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(received, reduce_op="max"))
        if not number:
            return
        path = write_last(trainer)
        told = f"{signal.Signals(number).name}: stopped after step {trainer.global_step}"
        if path:
            told += f", saved {path}; resume with --ckpt_path last"
        if not trainer.is_global_zero:
            raise StopRequested(0)
        raise StopRequested(128 + number, told)


def write_last(trainer: L.Trainer) -> Path | None:
    """Write `last.ckpt` into the run's checkpoint folder, unless it holds this step already.

    Returns:
        The path, or None under `fast_dev_run`, which leaves no files.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    folder = Path(trainer.default_root_dir) / "checkpoints"
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, Checkpoints):
            return callback.write_last(trainer)
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            folder = Path(callback.dirpath)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def _fitting(trainer: L.Trainer) -> bool:
    return trainer.state.fn == "fit" and not trainer.sanity_checking


class StopPredictionOnSigterm(L.Callback):
    """Raises StopRequested, a SystemExit, on SIGTERM while a Trainer predicts, tests or validates.

    `GracefulStop` is for training.

    Lightning's own handler only sets a note that the predict loop never reads, so `kill PID` would do nothing; a
    test that it ends exits like a finished one. With several processes it also broadcasts inside the handler,
    which can hang.

    Python drops what a handler raises while an object is being finalised, and prints it with a traceback. So
    nothing is raised in a `__del__`, and where the frame does not tell, as in a weak reference's callback, the
    print is suppressed. The next batch then ends the prediction.
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._received = 0
        self._tells, self._goes_on = True, ""
        self._reported: Callable[[Any], Any] = sys.unraisablehook

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signal after Lightning did."""
        if threading.current_thread() is threading.main_thread():
            self._received = 0
            self._tells = trainer.is_global_zero
            predicts = trainer.state.fn == "predict"
            self._goes_on = "; what is stored stays, the same command continues" if predicts else ""
            self._before = signal.signal(signal.SIGTERM, self._stop)
            self._reported = sys.unraisablehook
            sys.unraisablehook = self._report

    on_test_start = on_predict_start

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signal after Lightning did."""
        if trainer.state.fn == "validate":
            self.on_predict_start(trainer, pl_module)

    def on_predict_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Stop if the signal came but its exception was held back or lost."""
        if self._received:
            raise self._stopped()

    on_test_batch_start = on_validation_batch_start = on_predict_batch_start  # type: ignore[assignment]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signal back, after callbacks have used and written what was measured."""
        self._give_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signal back."""
        self._give_back()

    def _give_back(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            sys.unraisablehook = self._reported
            self._before = None

    def _report(self, dropped: Any) -> None:
        if not isinstance(dropped.exc_value, StopRequested):
            self._reported(dropped)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self._received = signum
        if not _finalising(frame):
            raise self._stopped()

    def _stopped(self) -> StopRequested:
        name = signal.Signals(self._received).name
        return StopRequested(128 + self._received, f"{name}: stopped{self._goes_on}" if self._tells else "")


def _finalising(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


class NonFiniteLoss(ValueError):
    """Raised when a loss or gradient is inf or nan; the weights are those before the step."""


@dataclass
class _Step:
    """An optimiser step that is about to be taken."""

    number: int
    batches: list[dict[str, Any]]
    norm: Tensor
    weights: list[torch.nn.Parameter]
    norms: Tensor | None = None  # of each weight's gradient

    def names(self, module: L.LightningModule) -> list[str]:
        """The weights whose gradients are not finite."""
        if self.norms is None:
            return [n for n, p in module.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
        names = {parameter: name for name, parameter in module.named_parameters()}
        return [names[p] for p, norm in zip(self.weights, self.norms.tolist(), strict=True) if not math.isfinite(norm)]


class NaNGuard(L.Callback):
    """Stops the run when a loss or the gradient norm is not finite, checked before each optimiser step on all ranks.

    No step with nan is ever taken: some steps later the weights, the moments and their average would be damaged, and
    perhaps saved. All ranks agree and raise together; an exception on one rank alone would leave the others waiting.

    On a GPU the device itself leaves such a step out (`optimizer_states.StepMark`), and the host, which does not wait
    for it, raises before the next step, checkpoint or validation. Elsewhere the host reads a flag before the step.

    `<default_root_dir>/nan-<step>.json` holds, for each rank, the clips of the step's micro-batches and their
    losses as they enter the backward pass (divided by `accumulate_grad_batches`). With fp16, gradients may
    overflow and the loss scaler skips such steps; then only losses are checked.
    """

    def __init__(self) -> None:
        self._batches: list[dict[str, Any]] = []
        self._last: tuple[StepMark, _Step] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the previous fit."""
        self._batches, self._last = [], None

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
        self._check_last(trainer, pl_module)
        batches = [batch for batch in self._batches if "loss" in batch]  # a training step may return no loss
        self._batches = []
        if not batches:
            return
        weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            weights = []
        losses = torch.stack([batch["loss"].float() for batch in batches])
        gradients = [weight.grad for weight in weights]
        step = _Step(trainer.global_step, batches, losses.new_zeros(()), weights)
        if gradients and skips_marked(optimizer):
            step.norms = torch.stack(torch._foreach_norm(gradients, 2, torch.float32))
            step.norm = torch.linalg.vector_norm(step.norms)
        elif gradients:
            step.norm = torch.nn.utils.get_total_norm(gradients)
        finite = losses.isfinite().all() & step.norm.isfinite()
        if step.norms is not None:
            self._last = StepMark(optimizer, ~finite, trainer.world_size), step
        elif trainer.strategy.reduce_boolean_decision(not finite, all=False):
            _stop(trainer, pl_module, step)

    def _check_last(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop if the last step was left out."""
        last, self._last = self._last, None
        if last is not None and last[0]:
            _stop(trainer, pl_module, last[1])

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop before the time is spent; at the end, too."""
        self._check_last(trainer, pl_module)

    on_train_end = on_validation_start

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stop before a checkpoint that counts a step which was not taken."""
        self._check_last(trainer, pl_module)


def _stop(trainer: L.Trainer, module: L.LightningModule, step: _Step) -> None:
    own = {
        "rank": trainer.global_rank,
        "batches": [{**batch, "loss": _number(batch["loss"])} for batch in step.batches],
        "gradient_norm": _number(step.norm),
        "non_finite_gradients": step.names(module),
    }
    ranks = list(gather_mappings({trainer.global_rank: own}).values())
    if not trainer.is_global_zero:
        raise SystemExit(0)  # see StopRequested
    logged = {name: _number(value) for name, value in trainer.callback_metrics.items()}
    raise NonFiniteLoss(_report_non_finite(trainer, step.number, ranks, logged))


def _report_non_finite(trainer: L.Trainer, step: int, ranks: list[dict[str, Any]], logged: dict[str, Any]) -> str:
    """Write the file; returns the error line."""
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
