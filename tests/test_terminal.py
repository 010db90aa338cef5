"""Status lines: what fits, and that other output keeps its place."""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import luve_lightning
from luve_lightning.terminal import StatusLine, duration, is_live
from tools.terminal_picture import Terminal, draw

LOSSES = tuple(f"loss{n} 0.{n:04}" for n in range(12))
LINE = StatusLine("step", 1240, 2200, 201.0, 156.0, LOSSES)


def drawn(line: StatusLine, width: int) -> list[str]:
    screen = io.StringIO()
    Console(file=screen, width=width).print(line.row(width))
    return screen.getvalue().splitlines()


@given(
    width=st.integers(20, 240),
    facts=st.lists(st.text("abc_/. ", min_size=1, max_size=30), max_size=15),
    total=st.none() | st.integers(1, 10**7),
    left=st.none() | st.floats(0, 10**6),
)
def test_it_is_one_line_at_any_width(width: int, facts: list[str], total: int | None, left: float | None) -> None:
    lines = drawn(StatusLine("step", 1, total, 3601.0, left, facts), width)
    assert len(lines) == 1
    assert len(lines[0]) <= width
    assert lines[0].startswith("step ")


@pytest.mark.parametrize(("width", "kept"), [(14, 0), (26, 0), (40, 1), (60, 1), (80, 2), (120, 5), (400, 12)])
def test_what_matters_least_is_left_out_first(width: int, kept: int) -> None:
    (line,) = drawn(LINE, width)
    assert line.startswith("step 1240/2200")
    assert ("2:36 left" in line) == (width >= 26)
    assert [fact in line for fact in LOSSES] == [n < kept for n in range(len(LOSSES))]
    assert ("━" in line) == (width >= 60)


def test_a_log_gets_all_of_it() -> None:
    line = StatusLine("step", 3, 10, 61.0, 3600.0, ("loss 0.2", "lr 1.0e-03"))
    assert line.sentence() == "step 3/10, 1:01 elapsed, 1:00:00 left: loss 0.2, lr 1.0e-03"
    assert StatusLine("step", 3, None, 5.0).sentence() == "step 3, 0:05 elapsed"


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.6, 754, 10931)] == ["0:00", "1:00", "12:34", "3:02:11"]


def test_a_log_that_wants_colours_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not is_live(Console(file=io.StringIO()))


PROGRAM = """
import logging, os, signal, sys
from rich.console import Console
logging.basicConfig(format="%(message)s")  # its handler keeps today's standard error
streams = sys.stdout, sys.stderr
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
import luve_lightning
from luve_lightning.terminal import StatusLine, StatusLines
lines = StatusLines(Console(), lambda: [StatusLine("step", 3, 9, 1.0), StatusLine("validation", 1, 2, 1.0)])
lines.start()
print("printed")
sys.stderr.write("half a "); sys.stderr.write("line\\n")
logging.warning("logged")
Console().print("by another console")
print("long " * 30)
if not (child := os.fork()):
    print("by a child", flush=True)
    os._exit(0)
os.waitpid(child, 0)
lines.refresh()
signal.sigwait({signal.SIGUSR1})  # a key would be echoed onto the screen
lines.stop()
assert (sys.stdout, sys.stderr) == streams
logging.warning("logged afterwards")
print("the end")
"""


def test_other_output_appears_above(repository: Path) -> None:
    terminal = Terminal([sys.executable, "-c", PROGRAM], folder=repository)
    assert terminal.wait_for(lambda lines: "by a child" in lines)
    assert terminal.wait_for(lambda lines: lines[lines.index("") - 1].startswith("validation 1/2"))
    assert terminal.shown()[:4] == ["printed", "half a line", "logged", "by another console"]
    assert " ".join(terminal.shown()[4:6]).split() == ["long"] * 30
    assert terminal.shown()[6] == "by a child"
    assert [line[:12] for line in terminal.shown() if line.startswith("step")] == ["step 3/9 ━━━"]
    os.kill(terminal.process, signal.SIGUSR1)
    assert terminal.finish() == 0
    assert not any("step" in line for line in terminal.shown())
    assert [line for line in terminal.shown() if line][-2:] == ["logged afterwards", "the end"]


def test_streams_that_are_files_are_left_alone(repository: Path, tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    command = f"exec {sys.executable} -c {shlex.quote(PROGRAM)} 2> {errors}"
    terminal = Terminal(["bash", "-c", command], folder=repository)
    assert terminal.wait_for(lambda lines: "by a child" in lines)
    os.kill(terminal.process, signal.SIGUSR1)
    assert terminal.finish() == 0
    assert errors.read_text() == "half a line\nlogged\nlogged afterwards\n"
    assert not any("logged" in line for line in terminal.everything())


def test_a_picture_shows_what_the_screen_does() -> None:
    terminal = Terminal(["printf", "\\033[31m━━━\\033[0m\\n\\nplain"], columns=20, lines=4)
    assert terminal.finish() == 0
    picture = draw(terminal.screen).convert("RGB")
    height = (picture.height - 32) // 4
    rows = [picture.crop((0, 16 + row * height, picture.width, 16 + (row + 1) * height)) for row in range(4)]
    colours = [{colour for _, colour in row.getcolors() or []} for row in rows]
    assert [len(found) > 1 for found in colours] == [True, False, True, False]
    assert any(red > 2 * green for red, green, _ in colours[0])
    assert not any(red > 2 * green for red, green, _ in colours[2])


def test_no_console_turns_users_names_into_pictures() -> None:
    """Rich takes `:v:` in a path or a prompt for an emoji, also where markup is off."""
    for path in Path(luve_lightning.__file__).parent.rglob("*.py"):
        for made in re.findall(r"\bConsole\((.*)", path.read_text(encoding="utf-8")):
            assert made.startswith("emoji=False"), path
