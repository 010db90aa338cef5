"""From the reports of evaluations to the table's files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from luve_lightning.ablations.graph import AblationPlanner
from luve_lightning.ablations.results import COLUMNS, collect, finished_rows, result_rows, t_interval
from luve_lightning.ablations.results_files import ResultsProvenance, write_results
from luve_lightning.ablations.stage_process import write_done
from tests.helpers.ablations import ROWS, TABLE, planner_of, write_table

PROVENANCE = ResultsProvenance("luve ablate small", "abc", "a CPU", {"torch": "2"}, "2026-01-01")
EVERY = {seed: list(ROWS) for seed in (0, 1)}
SCORES = {"full": {0: 5.0, 1: 6.0}, "low": {0: 3.0, 1: 4.75}, "plain": {0: 5.5, 1: 5.5}}


def finish(
    planner: AblationPlanner, scores: dict[str, dict[int, Any]], *, skip: tuple[str, ...] = ()
) -> None:
    """Write what running would have left."""
    for seed in planner.table.seeds:
        rows = [row for row in scores if seed in scores[row]]
        for stage in planner.plan({seed: rows}).stages.values():
            if stage.name in skip:
                continue
            if stage.name == "evaluate":
                cells = {row: {"n": 1, "metrics": {"score": {"value": scores[row][seed]}}} for row in rows}
                stage.folder.mkdir(parents=True)
                (stage.folder / "table.json").write_text(json.dumps({"methods": cells, "not_run": {}}))
            write_done(stage, {"seconds": 2.0, "revision": "abc"})


@pytest.fixture
def planner(tmp_path: Path) -> AblationPlanner:
    return planner_of(write_table(tmp_path / "small"), tmp_path / "runs")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_number_of_the_table(planner: AblationPlanner, tmp_path: Path) -> None:
    finish(planner, SCORES)
    found = collect(planner, EVERY)
    assert found.values == {row: {s: {"score": v} for s, v in own.items()} for row, own in SCORES.items()}
    paths = write_results(planner.table, found, {}, PROVENANCE, tmp_path / "out" / "small.csv")
    assert [path.name for path in paths] == ["small.csv", "small.json", "small.md"]
    assert (tmp_path / "out" / "small.csv").read_text().splitlines()[0] == (
        "table,row,title,metric,unit,better,seeds,mean,low,high,paper,paper_metric,difference,"
        "difference_low,difference_high,paper_difference,direction"
    )
    rows = {row["row"]: row for row in read_csv(tmp_path / "out" / "small.csv")}
    assert list(rows) == ["full", "low", "plain"]
    for name, own in SCORES.items():
        expected = t_interval(list(own.values()))
        cells = [float(rows[name][key]) for key in ("mean", "low", "high")]
        assert cells == pytest.approx([expected.mean, expected.low, expected.high], rel=1e-5)
        assert (rows[name]["seeds"], rows[name]["unit"], rows[name]["better"]) == ("2", "points", "higher")
        apart = t_interval([value - SCORES["full"][seed] for seed, value in own.items()])
        cells = [float(rows[name][key]) for key in ("difference", "difference_low", "difference_high")]
        assert cells == pytest.approx([apart.mean, apart.low, apart.high], rel=1e-5)
    low = rows["low"]
    assert [low[k] for k in ("paper", "paper_metric", "paper_difference")] == ["8", "Score", "-1"]
    # Differences -2 and -1.25: t(0.975, 1) is 12.7, the interval holds 0.
    assert low["direction"] == "none"
    assert (rows["plain"]["title"], rows["plain"]["paper"], rows["plain"]["direction"]) == (
        "plain words",
        "",
        "",
    )


def test_a_sure_difference_has_a_direction(planner: AblationPlanner) -> None:
    finish(planner, {"full": {0: 5.0, 1: 6.0}, "low": {0: 3.0, 1: 4.0}})
    [_, low] = result_rows(planner.table, collect(planner, EVERY).values)
    assert (low["difference"], low["direction"]) == (-2.0, "same")


def test_one_seed_has_no_interval_and_no_direction(planner: AblationPlanner, tmp_path: Path) -> None:
    finish(planner, {"full": {0: 5.0}, "low": {0: 3.0}})
    found = collect(planner, {0: EVERY[0]})
    write_results(planner.table, found, {}, PROVENANCE, tmp_path / "small.csv")
    low = read_csv(tmp_path / "small.csv")[1]
    assert (low["seeds"], low["low"], low["high"], low["direction"]) == ("1", "", "", "none")
    assert (low["difference"], low["difference_low"], low["difference_high"]) == ("-2", "", "")


def test_without_the_reference_row_there_are_no_differences(planner: AblationPlanner) -> None:
    finish(planner, {"low": {0: 3.0, 1: 4.0}})
    [low] = result_rows(planner.table, collect(planner, EVERY).values)
    assert (low["difference"], low["difference_low"], low["difference_high"]) == (None, None, None)
    assert (low["paper_difference"], low["direction"]) == (-1.0, "")


def test_differences_are_of_the_seeds_that_both_have(planner: AblationPlanner) -> None:
    values = {"full": {0: {"score": 5.0}, 1: {"score": 9.0}}, "low": {0: {"score": 4.0}}}
    [_, low] = result_rows(planner.table, values)
    assert (low["seeds"], low["mean"], low["difference"]) == (1, 4.0, -1.0)


def test_every_file_says_whose_numbers_these_are(planner: AblationPlanner, tmp_path: Path) -> None:
    finish(planner, SCORES)
    failed = {"low": {1: "it broke"}}
    write_results(planner.table, collect(planner, EVERY), failed, PROVENANCE, tmp_path / "small.csv")
    content = json.loads((tmp_path / "small.json").read_text())
    assert content["world"] == TABLE["world"]
    assert content["rows"]["full"] == {"0": {"score": 5.0}, "1": {"score": 6.0}}
    assert (content["seeds"], content["command"], content["revision"]) == ([0, 1], "luve ablate small", "abc")
    assert content["settings"] == {"value": 5.0}
    assert content["failed"] == {"low": {"1": "it broke"}}
    stages = {(s["name"], s["row"], s["seed"]) for s in content["stages"]}
    assert {
        ("data", None, None),
        ("expert", None, 0),
        ("generate", "low", 1),
        ("evaluate", None, 1),
    } <= stages
    assert all(set(s) >= {"name", "hash", "seconds", "row", "seed"} for s in content["stages"])
    text = (tmp_path / "small.md").read_text()
    assert TABLE["world"] in text
    assert "low, seed 1: it broke" in text
    assert "| full | 5.500 [-0.8531, 11.85] | 2 | 0 | 9.000 | 0 |  |" in text


def test_a_metric_that_did_not_run_is_named(tmp_path: Path) -> None:
    table = TABLE | {
        "metrics": TABLE["metrics"] | {"absent": {"better": "lower"}, "odd": {"better": "lower"}}
    }
    planner = planner_of(write_table(tmp_path / "small", table), tmp_path / "runs")
    finish(planner, {"full": {0: None, 1: "inf"}})
    for stage in planner.plan({0: ["full"]}).stages.values():
        if stage.name == "evaluate":
            report = json.loads((stage.folder / "table.json").read_text())
            (stage.folder / "table.json").write_text(
                json.dumps(report | {"not_run": {"absent": "needs a network"}})
            )
    found = collect(planner, EVERY)
    assert found.values == {}
    assert found.missing["absent"] == "needs a network"
    assert found.missing["odd"] == "full: the evaluation gives no odd"
    assert result_rows(planner.table, found.values) == []


def test_rows_are_finished_when_their_own_stages_are(planner: AblationPlanner) -> None:
    finish(planner, {"full": {0: 5.0}, "low": {0: 1.0, 1: 1.0}}, skip=("evaluate",))
    assert finished_rows(planner, EVERY) == {0: ["full", "low"], 1: ["low"]}
    found = collect(planner, EVERY)
    assert found.values == {}
    assert {stage["name"] for stage in found.stages} == {"data", "expert", "generate"}


def test_columns_are_the_tables() -> None:
    assert len(COLUMNS) == len(set(COLUMNS)) == 17


def test_a_row_that_others_have_finished_changes_no_evaluation(planner: AblationPlanner) -> None:
    """`low` may share every stage with another row or table: the evaluation that is read is that of the rows given."""
    finish(planner, {"full": {0: 5.0}, "low": {0: 1.0}}, skip=("evaluate",))
    finish(planner, {"full": {0: 5.0}})
    assert collect(planner, {0: ["full"]}).values == {"full": {0: {"score": 5.0}}}
    assert collect(planner, {0: ["full", "low"]}).values == {}
