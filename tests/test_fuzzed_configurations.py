"""Configurations with mistakes end with one line, not with a traceback; see tests/fuzz_configurations.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz_configurations import ARGUMENTS

IN_THE_SUITE = "--count=15"


@pytest.mark.slow
@pytest.mark.timeout(0)  # each case has a limit of its own
def test_mistakes_end_with_one_line(repository: Path, tmp_path: Path, tiny_places: dict[str, str]) -> None:
    words = os.environ.get(ARGUMENTS, IN_THE_SUITE).split(" --")
    arguments = [words[0], *(f"--{word}" for word in words[1:]), "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz_configurations", *arguments],
        cwd=repository,
        env={**os.environ, **tiny_places, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
