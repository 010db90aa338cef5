"""`luve evaluate` as real processes: killed and resumed."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.evaluation import read_csv, write_methods
from tests.helpers.luve_process import LuveProcess
from tests.helpers.renames import kill_before

COUNT = 8


def words(tmp_path: Path, folders: dict[str, Path], log: str, output: str) -> list[object]:
    return [
        *(f"--videos={name}={folder}" for name, folder in folders.items()),
        "--metrics.redness=tests.helpers.evaluation_metrics.Redness",
        f"--metrics.redness.log={tmp_path / log}",
        "--metrics.fd=luve_lightning.metrics.FrechetPatchDistance",
        "--metrics.fd.extractor=tests.helpers.evaluation_metrics.Means",
        "--metrics.fd.patches={size: 16, frames: 2}",
        f"--metrics.fd.reference={folders['near']}",
        f"--output={tmp_path / output / 'table.csv'}",
        f"--cache={tmp_path / 'cache'}",
        "--frechet_replicates=5",
        "--device=cpu",
    ]


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
def test_a_kill_loses_at_most_the_video_in_hand(tmp_path: Path) -> None:
    folders = write_methods(tmp_path, COUNT, {"near": 2.0, "far": 20.0})
    log = tmp_path / "log"
    run = words(tmp_path, folders, "log", "out")
    output = tmp_path / "output"
    killed = partial(kill_before, "*/cache/*.json", 5)
    LuveProcess(output, "evaluate", *run, prepare=killed).finish(-signal.SIGKILL)
    assert len(lines(log)) == 5
    assert not (tmp_path / "out" / "table.csv").exists()
    LuveProcess(output, "evaluate", *run).finish()
    assert len(lines(log)) == 2 * COUNT + 1
    assert [row["n"] for row in read_csv(tmp_path / "out" / "table.csv")] == [str(COUNT)] * 2
