"""The panels of a dashboard, drawn from the CSV logs of local runs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from luve_lightning.reporting.dashboard import Dashboard, Panel, Section, find_runs, read_dashboard
from luve_lightning.reporting.page import COLOURS, Unreadable


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
    assert [run.name for run in find_runs(["runs/*/experts*", "nothing*"], tmp_path)] == ["runs/mini/experts/lfe"]


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


def board(folders: list[str], max_runs: int = 24, **panels: Panel) -> Dashboard:
    return Dashboard("A board", "Metric('Group') == 'a'", folders, {"All": Section(panels)}, max_runs=max_runs)


def test_panels_are_charts_of_each_metric_or_tables_of_last_values(tmp_path: Path) -> None:
    write(tmp_path / "a", 0, "step,train/loss,val/x1,val/x2\n0,3,,\n9,2,5,6\n", when=100)
    write(tmp_path / "b", 0, "step,train/loss\n0,4\n7,1\n", when=200)
    drawn = read_dashboard(
        board(
            ["*"],
            Loss=Panel(["train/loss"]),
            Each=Panel(pattern=r"val/x\d"),
            Ends=Panel(["train/loss", "val/x1"], kind="last"),
            Nothing=Panel(["val/none"]),
            Results=Panel(["result/x"], kind="results"),
        ),
        tmp_path,
    )
    assert drawn.runs == ["b", "a"]
    loss, each, ends, nothing = drawn.sections["All"]
    (chart,) = loss.charts
    assert [(line.name, line.y[0], line.y[-1]) for line in chart.series] == [("b", 4, 1), ("a", 3, 2)]
    assert [chart.title for chart in each.charts] == ["Each: val/x1", "Each: val/x2"]
    assert ends.columns == ["run", "train/loss", "val/x1"]
    assert ends.rows == [["b", 1, None], ["a", 2, 5]]
    assert (nothing.charts, nothing.rows, nothing.metrics) == ([], [], ["val/none"])


def test_many_runs_share_an_axis_and_old_ones_are_counted(tmp_path: Path) -> None:
    for number in range(COLOURS + 3):
        write(tmp_path / f"run{number}", 0, f"step,train/loss\n0,{number + 1}\n", when=number + 1)
    drawn = read_dashboard(board(["run*"], COLOURS + 1, Loss=Panel(["train/loss"])), tmp_path)
    (loss,) = drawn.sections["All"]
    assert loss.left_out == 2
    assert [len(chart.series) for chart in loss.charts] == [COLOURS, 1]
    assert {chart.y_range for chart in loss.charts} == {(3.0, COLOURS + 3.0)}


def test_without_runs_or_with_another_file_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no metrics\.csv there"):
        read_dashboard(board(["*"], Loss=Panel(["train/loss"])), tmp_path)
    write(tmp_path / "a", 0, "time,loss\n0,1\n")
    with pytest.raises(Unreadable, match="it has no column step"):
        read_dashboard(board(["*"], Loss=Panel(["train/loss"])), tmp_path)
