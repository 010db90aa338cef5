"""How far a long command is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS = 30  # between the lines of a log


class Steps:
    """Counts steps of one stage after another and says how many are left, and how long they will take.

    Args:
        console: where to; a bar on a terminal, a line every half minute elsewhere.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.what, self.total, self.done = "", 0, 0
        self._started = self._told = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task = self._bar.add_task("", total=0) if self._bar else None

    def __enter__(self) -> Steps:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def begin(self, what: str, total: int) -> None:
        """Start a stage of so many steps."""
        self.what, self.total, self.done = what, total, 0
        self._started = self._told = time.monotonic()
        if self._bar and self._task is not None:
            self._bar.reset(self._task, description=what, total=total)

    def advance(self) -> None:
        """One step is done."""
        self.done += 1
        if self._bar and self._task is not None:
            self._bar.advance(self._task)
            return
        now = time.monotonic()
        if now - self._told >= _SECONDS and self.done < self.total:
            self._told = now
            left = (now - self._started) / self.done * (self.total - self.done)
            self.console.print(
                f"{self.what}: {self.done} of {self.total}, about {_duration(left)} left", highlight=False
            )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
