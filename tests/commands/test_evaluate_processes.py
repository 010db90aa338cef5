"""`luve evaluate` as real processes: killed and resumed."""

from __future__ import annotations

import time
from pathlib import Path

from tests.helpers.evaluate_process import start_evaluate
from tests.helpers.evaluation import read_csv, write_methods

COUNT = 8


def words(tmp_path: Path, folders: dict[str, Path], log: str, output: str, seconds: float) -> list[object]:
    metric = f"--metrics.redness.seconds={seconds}"
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
        metric,
    ]


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_a_kill_loses_at_most_the_video_in_hand(tmp_path: Path) -> None:
    folders = write_methods(tmp_path, COUNT, {"near": 2.0, "far": 20.0})
    log = tmp_path / "log"
    log.touch()
    victim = start_evaluate(*words(tmp_path, folders, "log", "out", 0.15))
    deadline = time.monotonic() + 60
    while len(lines(log)) < 5:
        assert victim.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    victim.kill()
    victim.join(60)
    done = len(lines(log))
    assert 5 <= done < 2 * COUNT
    assert not (tmp_path / "out" / "table.csv").exists()
    # The arguments are those of the same metric, or nothing would be known.
    again = start_evaluate(*words(tmp_path, folders, "log", "out", 0.15))
    again.join(60)
    assert again.exitcode == 0
    assert 2 * COUNT <= len(lines(log)) <= 2 * COUNT + 1
    assert [row["n"] for row in read_csv(tmp_path / "out" / "table.csv")] == [str(COUNT)] * 2
