"""Processes of tests that belong together: what one of them that fails has printed is told, and none is waited for."""

from __future__ import annotations

import atexit
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.luve_process import LuveProcess, finish_together
from tests.helpers.waiting import wait_for


def fail_beside(there: Path) -> None:
    assert wait_for(there.exists)
    print("the first line", *range(50), "no such clip", sep="\n", file=sys.stderr)
    raise SystemExit(3)


def wait_for_the_other(there: Path) -> None:
    print("waits", flush=True)
    there.touch()
    time.sleep(600)


def note_the_end(file: Path) -> None:
    atexit.register(file.touch)


@pytest.mark.slow
def test_what_one_that_fails_has_printed_is_told_and_the_others_are_killed(tmp_path: Path) -> None:
    there, began = tmp_path / "there", time.monotonic()
    prepares = [partial(function, there) for function in (wait_for_the_other, fail_beside)]
    both = [LuveProcess(tmp_path / f"log-{n}", "--version", prepare=one) for n, one in enumerate(prepares)]
    with pytest.raises(AssertionError) as told:
        finish_together(both)
    assert time.monotonic() - began < 60
    other, failed = str(told.value).split("--- ")[1:]
    assert other.splitlines() == ["log-0 was killed:", "waits"]
    assert failed.startswith("log-1 ended with 3 after")
    assert failed.splitlines()[1] == "the first line"
    assert failed.endswith("no such clip")
    both[0].process.join(30)
    assert not both[0].alive()


@pytest.mark.slow
def test_what_does_not_end_tells_where_it_is(tmp_path: Path) -> None:
    words = {"log-0": wait_for_the_other, "log-1": note_the_end}
    both = [
        LuveProcess(tmp_path / log, "--version", prepare=partial(function, tmp_path / "there"))
        for log, function in words.items()
    ]
    with pytest.raises(AssertionError) as told:
        finish_together(both, limit=5)
    ended, hangs = str(told.value).split("--- ")[1:]
    assert ended.startswith("log-1 ended with 0 after")
    assert hangs.startswith("log-0 runs after 5 s:")
    assert "in wait_for_the_other" in hangs


@pytest.mark.slow
def test_a_process_ends_as_a_program_does_with_what_was_registered_for_its_end(tmp_path: Path) -> None:
    process = LuveProcess(tmp_path / "log", "--version", prepare=partial(note_the_end, tmp_path / "end"))
    assert process.finish().startswith("luve-lightning")
    assert (tmp_path / "end").exists()
