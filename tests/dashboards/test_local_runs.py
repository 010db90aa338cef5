from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from luve_lightning.ablations.results import COLUMNS
from luve_lightning.dashboards.local_runs import find_runs, read_results, read_worlds

HEADER = ",".join(COLUMNS)


def write(folder: Path, version: int, text: str, when: int = 0) -> None:
    path = folder / "logs" / f"version_{version}" / "metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    os.utime(path, (when, when))


def curve(run: object, metric: str) -> list[tuple[float, float]]:
    x, y = run.curves[metric]  # type: ignore[attr-defined]
    return list(zip(x.tolist(), y.tolist(), strict=True))


def test_runs_are_found_by_pattern_the_newest_first(tmp_path: Path) -> None:
    write(tmp_path / "runs/mini/vluer", 0, "step,train/loss\n0,2\n9,1\n", when=100)
    write(tmp_path / "runs/mini/vluer-gpu", 0, "step,train/loss\n0,3\n", when=200)
    write(tmp_path / "runs/mini/experts/lfe", 0, "step,train/loss\n0,4\n", when=300)
    runs = find_runs(["runs/*/vluer*"], tmp_path)
    assert [run.name for run in runs] == ["runs/mini/vluer-gpu", "runs/mini/vluer"]
    assert curve(runs[1], "train/loss") == [(0, 2), (9, 1)]
    assert [run.name for run in find_runs(["runs/*/experts*", "nothing*"], tmp_path)] == [
        "runs/mini/experts/lfe"
    ]


def test_a_resume_replaces_what_came_after_its_start(tmp_path: Path) -> None:
    write(tmp_path / "a", 2, "step,train/loss,val/x\n10,1,\n19,,7\n30,0.5,\n")
    write(tmp_path / "a", 10, "step,train/loss\n30,0.4\n40,0.3\n")  # the tenth comes after the second
    write(tmp_path / "a", 1, "step,train/loss,val/x\n0,3,\n10,2.5,\n15,,9\n")
    [run] = find_runs(["*"], tmp_path)
    assert curve(run, "train/loss") == [(0, 3), (10, 1), (30, 0.4), (40, 0.3)]
    assert curve(run, "val/x") == [(19, 7)]


def test_a_new_run_in_the_folder_replaces_all_of_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / "a", 0, "step,train/loss,val/x\n5,3,\n900,2,1\n")
    write(tmp_path / "a", 1, "step,train/loss,val/x\n5,9,\n200,8,6\n")
    [run] = find_runs(["*"], tmp_path)
    assert curve(run, "val/x") == [(200, 6)]
    assert curve(run, "train/loss") == [(5, 9), (200, 8)]


def test_tests_and_validations_log_at_step_0_and_leave_curves_alone(tmp_path: Path) -> None:
    write(tmp_path / "a", 0, "step,train/loss,val/x\n5,3,\n9,2,1\n")
    write(tmp_path / "a", 1, "step,test/x,val/x\n0,0.25,\n")
    write(tmp_path / "a", 2, "step,val/x\n0,77\n")
    write(tmp_path / "a", 3, "step,train/loss,val/x\n12,1,\n15,,4\n")
    [run] = find_runs(["*"], tmp_path)
    assert curve(run, "val/x") == [(9, 1), (15, 4)]
    assert curve(run, "test/x") == [(0, 0.25)]


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a", 0, "step,train/loss,epoch\n1,nan,0\n2,1.5,\n3,inf,\n,8,\n4,2\n5,")
    [run] = find_runs(["*"], tmp_path)
    assert curve(run, "train/loss") == [(2, 1.5), (4, 2)]
    assert all(np.isfinite(values).all() for pair in run.curves.values() for values in pair)


def test_results_and_their_worlds(tmp_path: Path) -> None:
    (tmp_path / "mini").mkdir()
    table = tmp_path / "mini" / "experts.csv"
    table.write_text(
        f"{HEADER}\nexperts,full,full,fd,,lower,3,10.5,9.5,11.5,41.03,FID_patch,-1,-2,0.5,0,none\n"
    )
    unknown = "not recorded whose numbers these are"
    assert read_worlds(["*/*.csv"], tmp_path) == {unknown: ["mini/experts.csv"]}
    table.with_suffix(".json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"experts\.json: not JSON"):
        read_worlds(["*/*.csv"], tmp_path)
    table.with_suffix(".json").write_text('{"world": "mini world: small"}')
    [result] = read_results(["*/*.csv"], tmp_path)
    assert (result.file, result.row, result.metric, result.seeds) == ("mini/experts.csv", "full", "fd", "3")
    assert (result.mean, result.low, result.high, result.paper) == ("10.5", "9.5", "11.5", "41.03")
    assert (result.better, result.direction) == ("lower", "none")
    assert (result.difference, result.difference_low, result.difference_high) == ("-1", "-2", "0.5")
    (tmp_path / "mini" / "rank.csv").write_bytes(table.read_bytes())
    (tmp_path / "mini" / "rank.json").write_bytes(table.with_suffix(".json").read_bytes())
    assert read_worlds(["*/*.csv"], tmp_path) == {"mini world: small": ["mini/experts.csv", "mini/rank.csv"]}
    table.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"experts\.csv is no table of `luve ablate`: no column better"):
        read_results(["*/*.csv"], tmp_path)
