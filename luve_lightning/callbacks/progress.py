"""How far a run is, and how fast: one bar over all its steps on a terminal, a line in a log."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, Timer
from rich.console import Console
from torch import Tensor

from luve_lightning.terminal import StatusLine, StatusLines, duration, is_live, say

_READ_EVERY = 0.25  # seconds: reading a loss waits for the device
_PACE_OVER = 60.0  # seconds from which the remaining time is estimated


@dataclass
class _Count:
    """Steps or batches done, and the recent pace."""

    label: str
    total: int | None
    done: int = 0
    facts: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    paused: float = 0.0  # seconds that count as elapsed but not towards the pace
    _late: deque[tuple[float, int]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._late.append((self.started, self.done))

    def advance(self, done: int) -> None:
        """Set how many are done."""
        self.done = done
        now = time.monotonic() - self.paused
        if now - self._late[-1][0] >= _READ_EVERY:
            self._late.append((now, done))
            while len(self._late) > 8 and now - self._late[1][0] > _PACE_OVER:
                self._late.popleft()

    def left(self) -> float | None:
        """Seconds to the end at the recent pace."""
        (since, before), done = self._late[0], self.done
        if self.total is None or done <= before:
            return None
        return (time.monotonic() - self.paused - since) / (done - before) * max(0, self.total - done)


class TrainingProgress(ProgressBar):
    """Shows the step, the losses, the learning rate, and the time elapsed and left.

    On a terminal this is one line over the optimiser steps of the whole run (`max_steps`, or those of
    `max_epochs`), which starts where a resumed run does, and a second line while a validation runs. It fits any
    width by leaving out what matters least. Other output appears above it. A finished validation leaves a line
    with what it logged. Elsewhere (a file, a job's log) there are plain lines. `test`, `validate` and `predict`
    count their batches. Only rank zero writes.

    Args:
        every_n_steps: steps between lines of a log; None: a tenth of the run, at most 100.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps: expected >= 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._enabled = True
        self._console = Console(emoji=False)
        self._lines: StatusLines | None = None
        self._train: _Count | None = None
        self._batches: _Count | None = None  # for a validation, test or prediction
        self._validation: dict[str, float] = {}
        self._read = 0.0

    def disable(self) -> None:
        """Show nothing."""
        self._enabled = False

    def enable(self) -> None:
        """Show it again."""
        self._enabled = True

    @property
    def is_enabled(self) -> bool:
        """Whether it shows anything."""
        return self._enabled

    # Training

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from the step where the run begins or resumes."""
        total = trainer.estimated_stepping_batches
        whole = None if math.isinf(total) else max(int(total), trainer.global_step)
        self._train = _Count("step", whole, trainer.global_step)
        self._show()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the optimiser step if this batch completed one."""
        count = self._train
        if count is None or not self._enabled or trainer.global_step == count.done:
            return
        count.advance(trainer.global_step)
        now, due = time.monotonic(), self._line_is_due(count)
        drawn = self._lines is not None and (now - self._read >= _READ_EVERY or not count.facts)
        if due or drawn:
            self._read = now
            count.facts = self._training_facts(trainer)
        if due and self._lines is None:
            self._print(self._training_line(trainer).sentence())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the bar: what follows is not counted."""
        self._hide()

    def _line_is_due(self, count: _Count) -> bool:
        every = self.every_n_steps or max(1, min(100, (count.total or 1000) // 10))
        return self._lines is None and (count.done % every == 0 or count.done == count.total)

    def _training_facts(self, trainer: L.Trainer) -> list[str]:
        important, others = _logged(trainer, on_step=True)
        facts = named_numbers({**important, **others}, "train/")
        if self._lines is not None:  # a log has a separate line; the prefix stays, because both may have a `loss`
            facts += named_numbers(self._validation)
        rates = [group["lr"] for optimizer in trainer.optimizers[:1] for group in optimizer.param_groups[:1]]
        return facts + [f"lr {float(rate):.1e}" for rate in rates]

    def _training_line(self, trainer: L.Trainer) -> StatusLine:
        count = self._train
        assert count is not None
        limits = [count.left(), *_time_limits(trainer)]
        known = [seconds for seconds in limits if seconds is not None]
        elapsed = time.monotonic() - count.started
        return StatusLine(count.label, count.done, count.total, elapsed, min(known, default=None), tuple(count.facts))

    # Validation, test, prediction

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count its batches."""
        if trainer.sanity_checking:
            self._begin("sanity check", trainer.num_sanity_val_batches)
        else:
            self._begin("validation", trainer.num_val_batches)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count its batches."""
        self._begin("test", trainer.num_test_batches)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count its batches."""
        self._begin("predict", trainer.num_predict_batches)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Count a batch."""
        self._advance(quiet=trainer.state.fn == "fit")

    def on_test_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Count a batch."""
        self._advance()

    on_predict_batch_end = on_test_batch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave a line with what it logged."""
        count, self._batches = self._batches, None
        if count is None or trainer.sanity_checking or not self._enabled:
            return
        seconds = time.monotonic() - count.started
        if self._train is not None:
            self._train.paused += seconds
        important, others = _logged(trainer, on_step=False)
        if trainer.state.fn != "fit":
            self._hide()
        elif important or others:
            self._validation = important
            line = f"step {trainer.global_step}, validation in {duration(seconds)}: "
            facts = named_numbers({**important, **others}, "val/")
            width = self._console.width if self._lines is not None else None  # a log shows all of them
            self._print(line + _as_many_as_fit(facts, width and width - len(line)))

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make room for training's bar."""
        self._batches = None

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the bar: tables may follow."""
        self._batches = None
        self._hide()

    on_predict_end = on_test_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remove the bar so that the error is visible."""
        self._hide()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove the bar, and forget the run."""
        self._hide()
        self._train = self._batches = None
        self._validation = {}

    def _begin(self, label: str, batches: Sequence[int | float] | int | float) -> None:
        total = sum(batches) if isinstance(batches, Sequence) else batches
        self._batches = _Count(label, None if math.isinf(total) else int(total))
        self._show()

    def _advance(self, quiet: bool = False) -> None:
        count = self._batches
        if count is None or not self._enabled:
            return
        count.advance(count.done + 1)
        if not quiet and self._line_is_due(count):
            self._print(_batch_line(count).sentence())

    # Drawing

    def _show(self) -> None:
        if self._enabled and self._lines is None:
            self._console = Console(emoji=False)  # the current standard output
            if is_live(self._console):
                self._lines = StatusLines(self._console, self._status)
                self._lines.start()

    def _hide(self) -> None:
        lines, self._lines = self._lines, None
        if lines is not None:
            lines.stop()

    def _status(self) -> list[StatusLine]:
        train, batches = self._train, self._batches
        lines = [] if train is None else [self._training_line(self.trainer)]
        return lines + ([] if batches is None else [_batch_line(batches)])

    def _print(self, text: str) -> None:
        # Through the stream that draws above the bar, if there is one.
        say(Console(emoji=False), text)

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """`LightningModule.print`."""
        if self._enabled:
            print(*args, sep=sep, **kwargs)  # noqa: T201


def named_numbers(values: Mapping[str, float], prefix: str = "") -> list[str]:
    """`loss 0.2041` for each, without the prefix of its name."""
    return [f"{name.removeprefix(prefix)} {number(value)}" for name, value in values.items()]


def number(value: float) -> str:
    """A number with four significant digits."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e4:
        return str(int(value))
    return f"{value:#.4g}".rstrip(".")


def _batch_line(count: _Count) -> StatusLine:
    elapsed = time.monotonic() - count.started
    return StatusLine(count.label, count.done, count.total, elapsed, count.left(), tuple(count.facts))


def _as_many_as_fit(facts: Sequence[str], width: int | None) -> str:
    """As many of them as fit in one line, at least one."""
    text = facts[0]
    for fact in facts[1:]:
        if width is not None and len(text) + 2 + len(fact) > width:
            break
        text += f", {fact}"
    return text


def _logged(trainer: L.Trainer, on_step: bool) -> tuple[dict[str, float], dict[str, float]]:
    """What the running loop has logged for the progress bar (`prog_bar=True`), and the rest."""
    results = trainer._results
    if results is None:
        return {}, {}
    found = results.metrics(on_step)
    important, every = (
        {name: float(v) for name, v in found[kind].items() if not isinstance(v, Tensor) or v.numel() == 1}
        for kind in ("pbar", "callback")
    )
    return important, {name: value for name, value in every.items() if name not in important}


def _time_limits(trainer: L.Trainer) -> list[float | None]:
    """Seconds left of `max_time`."""
    timers = [c for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
    return [timer.time_remaining("train") for timer in timers]
