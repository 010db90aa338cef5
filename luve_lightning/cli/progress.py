"""How far a long command is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console

from luve_lightning.terminal import StatusLine, StatusLines, is_live

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
        shown = is_live(console) and not console.quiet
        self._bar = StatusLines(console, self._status) if shown else None

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
        if self._bar:
            self._bar.refresh()

    def advance(self, count: int = 1) -> None:
        """So many more steps are done."""
        self.done += count
        if self._bar:
            return
        now = time.monotonic()
        if now - self._told >= _SECONDS and 0 < self.done < self.total:
            self._told = now
            self.console.print(
                f"{self.what}: {self.done} of {self.total}, about {_duration(self._left(now))} left",
                highlight=False,
            )

    def _left(self, now: float) -> float:
        return (now - self._started) / self.done * (self.total - self.done)

    def _status(self) -> list[StatusLine]:
        if not self.total:
            return []
        now = time.monotonic()
        left = self._left(now) if self.done else None
        return [StatusLine(self.what, self.done, self.total, now - self._started, left)]


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
