"""How far a command is: status lines at the bottom of a terminal, with output above them, or lines in a log."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

# rich is loaded where something is drawn: ComfyUI's nodes take `amount` from here and do without it.
if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

_SECONDS_BETWEEN_LINES = 30  # between the lines of a log
_SHORTEST_BAR, _LONGEST_BAR = 10, 40
_REFRESHES_PER_SECOND = 4
_FREE_COLUMNS = len("^C")  # a terminal shows it behind the line as typed, and must not continue below it
_LAST_LINE = b"\0\n"
_LONG = 4.0  # seconds that a phase takes before it is worth a line
_LONG_IN_ALL = 20.0  # of several phases together


@dataclass(frozen=True)
class StatusLine:
    """How far something is.

    Attributes:
        label: what is counted, such as "step".
        done: number done.
        total: total number; None when unknown.
        elapsed: seconds since it began.
        left: remaining seconds; None when unknown.
        facts: further facts, most important first; what does not fit is left out.
    """

    label: str
    done: int
    total: int | None
    elapsed: float
    left: float | None = None
    facts: Sequence[str] = ()

    def count(self) -> str:
        """`step 12/2200`, equally wide at the beginning and at the end."""
        return f"{self.label} {self.done}" if self.total is None else (
            f"{self.label} {self.done:{len(str(self.total))}}/{self.total}"
        )  # fmt: skip

    def row(self, width: int) -> RenderableType:
        """One line of at most `width` columns: count, bar, times, facts."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        left = "" if self.left is None else f"{duration(self.left)} left"
        elapsed = duration(self.elapsed)
        space = width - len(self.count())
        kept: list[str] = []
        # In order of importance. Nothing replaces something more important that was too long.
        for text in (left, *self.facts[:1], "bar", elapsed, *self.facts[1:]):
            needed = _SHORTEST_BAR + 1 if text == "bar" else len(text) + 2
            if needed > space:
                break
            if text:
                kept.append(text)
                space -= needed
        facts = [text for text in self.facts if text in kept]
        times = [text for text in (elapsed, left) if text and text in kept]
        row = [Text(self.count(), no_wrap=True, overflow="ellipsis")]
        if "bar" in kept:
            length = min(_LONGEST_BAR, _SHORTEST_BAR + max(0, space))
            bar = ProgressBar(self.total, self.done, width=length, pulse=self.total is None)
            row = [row[0], bar]  # type: ignore[list-item]
        if times:
            row.append(Text("  ".join(times), style="progress.remaining", no_wrap=True))
        if facts:
            row.append(Text(" " + "  ".join(facts), no_wrap=True))
        grid = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
        grid.add_row(*row)
        return grid

    def sentence(self) -> str:
        """The same for a log: everything in one line, without a bar."""
        times = [f"{duration(self.elapsed)} elapsed"]
        times += [] if self.left is None else [f"{duration(self.left)} left"]
        head = f"{self.label} {self.done}" + ("" if self.total is None else f"/{self.total}")
        return f"{head}, {', '.join(times)}" + (f": {', '.join(self.facts)}" if self.facts else "")


def duration(seconds: float) -> str:
    """`0:07`, `12:30`, `3:02:11`."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def amount(count: int, one: str, more: str = "") -> str:
    """`1 clip`, `2 clips`; `more` is the plural of what does not end in an s."""
    return f"{count} {one if count == 1 else more or f'{one}s'}"


def is_live(console: Console) -> bool:
    """Whether lines can be redrawn: a capable terminal, not a log that wants colours (FORCE_COLOR)."""
    return console.is_interactive and console.file.isatty()


class StatusLines:
    """Draws status lines at the bottom of a terminal, from `start` to `stop`.

    Meanwhile standard output, standard error and their log handlers write above the lines, as far as they are that
    terminal. So do processes forked meanwhile, such as a loader's workers.

    Args:
        console: console of a terminal, see `is_live`.
        lines: returns the lines to draw; called a few times a second from another thread.
    """

    def __init__(self, console: Console, lines: Callable[[], Sequence[StatusLine]]) -> None:
        from rich.console import Console

        # Another Console on standard output must not find this one's file behind the replaced stream.
        self._console = Console(emoji=False, file=console.file, width=console._width)
        self._lines = lines
        self._live: Live | None = None
        self._streams: dict[str, TextIO] = {}
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._pipe = -1
        self._relay: threading.Thread | None = None

    def start(self) -> None:
        """Begin to draw; does nothing when already begun."""
        if self._live is not None:
            return
        from rich.live import Live

        self._live = Live(
            get_renderable=self._render,
            console=self._console,
            refresh_per_second=_REFRESHES_PER_SECOND,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        reader, self._pipe = os.pipe()
        self._relay = threading.Thread(target=_print_lines, args=(reader, self._console), daemon=True)
        self._relay.start()
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream.isatty() and not isinstance(stream, _Above):
                self._streams[name] = stream
                setattr(sys, name, _Above(stream, self._console, self._pipe))
        self._divert_logs()
        self._live.start(refresh=True)

    def stop(self) -> None:
        """Remove the lines and give the streams back."""
        if self._live is None:
            return
        live, self._live = self._live, None
        assert self._relay is not None
        try:
            os.write(self._pipe, _LAST_LINE)
            self._relay.join()
            os.close(self._pipe)
            live.stop()
        finally:
            for handler, stream in self._handlers:
                handler.setStream(stream)
            for name, stream in self._streams.items():
                above = getattr(sys, name)
                if isinstance(above, _Above):
                    setattr(sys, name, stream)
                    above.finish()
            self._handlers, self._streams = [], {}

    def refresh(self) -> None:
        """Draw now."""
        if self._live is not None:
            self._live.refresh()

    def _divert_logs(self) -> None:
        """Redirect log handlers, which keep the stream that they were made with."""
        above = {stream: getattr(sys, name) for name, stream in self._streams.items()}
        for logger in (logging.getLogger(), *logging.Logger.manager.loggerDict.values()):
            for handler in getattr(logger, "handlers", ()):
                stream = getattr(handler, "stream", None)
                if isinstance(handler, logging.StreamHandler) and stream in above:
                    self._handlers.append((handler, stream))
                    handler.setStream(above[stream])

    def _render(self) -> RenderableType:
        from rich.console import Group

        return Group(*(line.row(self._console.width - _FREE_COLUMNS) for line in self._lines()))


def _print_lines(reader: int, console: Console) -> None:
    """Prints what child processes write, until the last line arrives."""
    from rich.ansi import AnsiDecoder

    decoder = AnsiDecoder()
    with open(reader, "rb") as lines:
        for line in lines:
            if line == _LAST_LINE:
                break
            console.print(decoder.decode_line(line.decode("utf-8", "replace").rstrip("\n")), soft_wrap=True)


class _Above:
    """Replaces a terminal's stream and prints whole lines above the status lines.

    A forked process may have copied a lock that nobody will release, and does not know where the lines are: it
    sends its output through a pipe.
    """

    def __init__(self, stream: TextIO, console: Console, pipe: int) -> None:
        from rich.ansi import AnsiDecoder

        self._stream, self._console, self._pipe = stream, console, pipe
        self._decoder, self._rest = AnsiDecoder(), ""
        self._process, self._lock = os.getpid(), threading.RLock()
        self._rests: dict[int, str] = {}  # in a child process

    def write(self, text: str) -> int:
        if os.getpid() != self._process:
            return self._write_in_child(text)
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._console.print(self._decoder.decode_line(line), soft_wrap=True)
        return len(text)

    def _write_in_child(self, text: str) -> int:
        *lines, rest = (self._rests.get(os.getpid(), "") + text).split("\n")
        self._rests = {os.getpid(): rest}
        whole = "".join(f"{line}\n" for line in lines)
        try:
            os.write(self._pipe, whole.encode("utf-8", "replace"))
        except OSError:  # the lines are gone
            self._stream.write(whole)
            self._stream.flush()
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        """Nothing: whole lines are printed at once, a partial one waits for its end."""

    def finish(self) -> None:
        """Write the rest that did not end in a newline."""
        rest, self._rest = self._rest, ""
        self._stream.write(rest)
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Steps:
    """Counts steps of one stage after another; says how many are left, and how long they will take.

    Args:
        console: prints to it; a bar on a terminal, a line every half minute elsewhere.
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

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def begin(self, what: str, total: int) -> None:
        """Start a stage of this many steps."""
        self.what, self.total, self.done = what, total, 0
        self._started = self._told = time.monotonic()
        if self._bar:
            self._bar.refresh()

    def advance(self, count: int = 1) -> None:
        """Count this many more steps as done."""
        self.done += count
        if self._bar:
            return
        now = time.monotonic()
        if now - self._told >= _SECONDS_BETWEEN_LINES and 0 < self.done < self.total:
            self._told = now
            self.console.print(
                f"{self.what}: {self.done} of {self.total}, about {_in_words(self._left(now))} left", highlight=False
            )

    def _left(self, now: float) -> float:
        return (now - self._started) / self.done * (self.total - self.done)

    def _status(self) -> list[StatusLine]:
        if not self.total:
            return []
        now = time.monotonic()
        left = self._left(now) if self.done else None
        return [StatusLine(self.what, self.done, self.total, now - self._started, left)]


class Phases:
    """Says what a command is busy with, phase by phase: a line as soon as a phase has taken a while.

    Args:
        tell: prints a line; called from another thread.
        after: seconds from which a phase is told.
        clock: the time in seconds.
    """

    def __init__(
        self, tell: Callable[[str], None], after: float = _LONG, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.tell, self.after, self.clock = tell, after, clock
        self.taken: dict[str, float] = {}
        self._now: tuple[str, float] | None = None
        self._timer: threading.Timer | None = None

    def begin(self, what: str) -> None:
        """End the phase before, and begin one that this says, such as "loading the model"."""
        self.end()
        self._now = what, self.clock()
        self._timer = threading.Timer(self.after, self.tell, [f"{what} ..."])
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> None:
        """End the phase, if there is one."""
        if self._timer is not None:
            self._timer.cancel()
        if self._now is not None:
            what, since = self._now
            self.taken[what] = self.taken.get(what, 0.0) + self.clock() - since
        self._now = self._timer = None

    def close(self, what: str) -> None:
        """End the last phase; when all took long, say in a line what this took, such as "first step", and each."""
        self.end()
        seconds = sum(self.taken.values())
        if seconds >= _LONG_IN_ALL:
            parts = [f"{name} {duration(taken)}" for name, taken in self.taken.items() if taken >= 1]
            self.tell(f"{what} after {duration(seconds)}: {', '.join(parts)}")
        self.taken = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the timer, which a process started by pickling cannot be given."""
        return {**vars(self), "_timer": None}


def _in_words(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def say(console: Console, text: str) -> None:
    """Print lines literally: names and reasons are no markup, and a path is not broken."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)
