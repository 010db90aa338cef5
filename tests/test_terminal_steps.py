"""Progress of long commands, on a terminal and in a log."""

from __future__ import annotations

import io
import re
import threading

import pytest
from rich.console import Console

from luve_lightning import terminal
from luve_lightning.terminal import Phases, Steps


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    log = io.StringIO()
    with Steps(Console(file=log)) as steps:
        steps.begin("videos", 400)
        for _ in range(10):
            now[0] += 12
            steps.advance()
    assert log.getvalue().splitlines() == [
        "videos: 3 of 400, about 79 min left",
        "videos: 6 of 400, about 79 min left",
        "videos: 9 of 400, about 78 min left",
    ]


def test_quick_stages_and_ends_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    log = io.StringIO()
    with Steps(Console(file=log)) as steps:
        for _ in range(3):
            steps.begin("quick", 1)
            now[0] += 40
            steps.advance()
    assert log.getvalue() == ""


class Screen(io.StringIO):
    """Claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    with Steps(Console(file=screen, force_terminal=True, width=80)) as steps:
        steps.begin("videos", 2)
        steps.advance()
    assert "videos 0/2 ━" in re.sub("\x1b\\[[0-9;]*m", "", screen.getvalue())
    assert "videos 1/2 ━" in re.sub("\x1b\\[[0-9;]*m", "", screen.getvalue())
    with Steps(Console(file=io.StringIO(), force_terminal=True)) as steps:  # FORCE_COLOR in a log
        steps.begin("videos", 2)
    assert steps.console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_a_phase_is_told_while_it_goes_on() -> None:
    told, heard = list[str](), threading.Event()
    phases = Phases(lambda line: (told.append(line), heard.set())[1], after=0)
    phases.begin("loading the model")
    assert heard.wait(60)  # the phase has not ended
    phases.end()
    assert told == ["loading the model ..."]


def test_quick_phases_say_nothing_and_long_ones_are_summed_up() -> None:
    now, told = [0.0], list[str]()
    phases = Phases(told.append, after=3600, clock=lambda: now[0])
    for seconds in (4, 0.5, 90, 3):  # a minute and a half, of which nothing was told: the timer is the real clock's
        phases.begin({4: "loading", 0.5: "setting up", 90: "starting 2 processes", 3: "loading"}[seconds])
        now[0] += seconds
    phases.close("first step done")
    assert told == ["first step done after 1:38: loading 0:07, starting 2 processes 1:30"]
    phases.begin("loading")
    now[0] += 19
    phases.close("first step done")
    assert len(told) == 1
    assert not any(
        isinstance(thread, threading.Timer) and not thread.finished.is_set() for thread in threading.enumerate()
    )
