"""Configurations with mistakes end with one line, not with a traceback; see tests/fuzz_configurations.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fuzz_configurations import ARGUMENTS, run_logged
from tests.helpers.fork_server import start_process

IN_THE_SUITE = "--count=15"


@pytest.mark.slow
@pytest.mark.timeout(0)  # each case has a limit of its own
def test_mistakes_end_with_one_line(tmp_path: Path, tiny_places: dict[str, str]) -> None:
    words = os.environ.get(ARGUMENTS, IN_THE_SUITE).split(" --")
    arguments = [words[0], *(f"--{word}" for word in words[1:]), "--folder", str(tmp_path)]
    log = tmp_path / "log.txt"
    process = start_process(run_logged, arguments, tiny_places, log)
    process.join()
    said = log.read_text(encoding="utf-8")
    assert process.exitcode == 0, said
    print(said)
