"""Progress of long commands, on a terminal and in a log."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from luve_lightning import terminal
from luve_lightning.terminal import Steps


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
