"""From the reports of evaluations to the table's files."""

from __future__ import annotations

import csv
import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from luve_lightning.ablations.graph import AblationPlanner
from luve_lightning.ablations.output import results_lines, verdict
from luve_lightning.ablations.results import (
    COLUMNS,
    ResultsProvenance,
    collect,
    detectable,
    direction,
    finished_rows,
    noncentrality,
    paired,
    read_results,
    result_rows,
    t_interval,
    write_results,
)
from luve_lightning.ablations.stage_process import write_done
from tests.helpers.ablations import ROWS, TABLE, planner_of, write_table

PROVENANCE = ResultsProvenance("luve ablate small", "abc", "a CPU", {"torch": "2"}, "2026-01-01")
EVERY = {seed: list(ROWS) for seed in (0, 1)}
SCORES = {"full": {0: 5.0, 1: 6.0}, "low": {0: 3.0, 1: 4.75}, "plain": {0: 5.5, 1: 5.5}}


def finish(planner: AblationPlanner, scores: dict[str, dict[int, Any]], *, skip: tuple[str, ...] = ()) -> None:
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
        "difference_low,difference_high,paper_difference,direction,would_see"
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
    assert (rows["plain"]["title"], rows["plain"]["paper"], rows["plain"]["direction"]) == ("plain words", "", "")


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


def test_what_is_written_is_read_back(planner: AblationPlanner, tmp_path: Path) -> None:
    finish(planner, SCORES)
    found = collect(planner, EVERY)
    write_results(planner.table, found, {}, PROVENANCE, tmp_path / "small.csv")
    rows, about = read_results(tmp_path / "small.csv")
    assert about == json.loads((tmp_path / "small.json").read_text())
    for read, made in zip(rows, result_rows(planner.table, found.values), strict=True):
        assert list(read) == list(made)
        for key, value in made.items():
            if key in ("paper", "paper_difference"):  # as the file writes them
                assert read[key] == ("" if value is None else f"{value:g}")
            elif isinstance(value, str):
                assert read[key] == value
            else:
                assert read[key] == pytest.approx(value, rel=1e-5, nan_ok=True)
    with pytest.raises(FileNotFoundError, match="missing"):
        read_results(tmp_path / "other.csv")


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
    assert {("data", None, None), ("expert", None, 0), ("generate", "low", 1), ("evaluate", None, 1)} <= stages
    assert all(set(s) >= {"name", "hash", "seconds", "row", "seed"} for s in content["stages"])
    text = (tmp_path / "small.md").read_text()
    assert TABLE["world"] in text
    assert "low, seed 1: it broke" in text
    assert "| full | 5.500 [-0.8531, 11.85] | 2 | 0 |  | 9.000 | 0 |  |" in text


def test_of_a_number_to_be_read_beside_others_neither_direction_is_called_better(tmp_path: Path) -> None:
    beside = {"better": "neither", "column": "score", "unit": "points"}
    planner = planner_of(write_table(tmp_path / "small", TABLE | {"metrics": {"beside": beside}}), tmp_path / "runs")
    finish(planner, SCORES)
    found = collect(planner, EVERY)
    write_results(planner.table, found, {}, PROVENANCE, tmp_path / "small.csv")
    assert "## beside in points\n" in (tmp_path / "small.md").read_text()
    lines = results_lines(planner.table, result_rows(planner.table, found.values), {}, tmp_path / "small.csv")
    assert "beside, points" in lines
    rows, _ = read_results(tmp_path / "small.csv")
    assert {row["better"] for row in rows} == {""}


def test_a_metric_that_did_not_run_is_named(tmp_path: Path) -> None:
    table = TABLE | {"metrics": TABLE["metrics"] | {"absent": {"better": "lower"}, "odd": {"better": "lower"}}}
    planner = planner_of(write_table(tmp_path / "small", table), tmp_path / "runs")
    finish(planner, {"full": {0: None, 1: "inf"}})
    for stage in planner.plan({0: ["full"]}).stages.values():
        if stage.name == "evaluate":
            report = json.loads((stage.folder / "table.json").read_text())
            (stage.folder / "table.json").write_text(json.dumps(report | {"not_run": {"absent": "needs a network"}}))
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
    assert len(COLUMNS) == len(set(COLUMNS)) == 18


def test_a_row_that_others_have_finished_changes_no_evaluation(planner: AblationPlanner) -> None:
    """`low` may share every stage with another row or table: the evaluation that is read is that of the rows given."""
    finish(planner, {"full": {0: 5.0}, "low": {0: 1.0}}, skip=("evaluate",))
    finish(planner, {"full": {0: 5.0}})
    assert collect(planner, {0: ["full"]}).values == {"full": {0: {"score": 5.0}}}
    assert collect(planner, {0: ["full", "low"]}).values == {}


NUMBERS = st.floats(-1e4, 1e4).map(lambda value: round(value, 6))
SAMPLES = st.lists(NUMBERS, min_size=2, max_size=6)


def test_the_files_tell_power_and_verdicts(planner: AblationPlanner, tmp_path: Path) -> None:
    finish(planner, SCORES)
    found = collect(planner, EVERY)
    write_results(planner.table, found, {}, PROVENANCE, tmp_path / "small.csv")
    power = json.loads((tmp_path / "small.json").read_text())["power"]
    assert (power["probability"], power["two_sided_level"]) == (0.8, 0.05)
    # Two seeds differ by -2 and -1.25: their mean's standard error is 0.375, and 16.33 of these are seen.
    assert power["rows"]["low"]["score"]["would_have_seen"] == pytest.approx(0.375 * 16.334, rel=1e-3)
    assert power["rows"]["low"]["score"]["verdict"] == "not decided (would have seen 6.13)"
    assert "verdict" not in power["rows"]["plain"]["score"]  # the paper has no such row
    assert "full" not in power["rows"]
    text = (tmp_path / "small.md").read_text()
    [line] = [line for line in text.splitlines() if line.startswith("| low")]
    assert line.split(" | ")[-1] == "not decided (would have seen 6.13) |"
    assert "| would see |" in text
    assert "probability of 80 %" in text

    shutil.rmtree(planner.root)
    finish(planner, {"full": {0: 5.0, 1: 6.0}, "low": {0: 3.0, 1: 4.0}})
    [_, low] = result_rows(planner.table, collect(planner, EVERY).values)
    assert verdict(low) == "holds"
    assert verdict(low | {"direction": "opposite"}) == "opposite"
    assert verdict(low | {"direction": "none", "would_see": None}) == "not decided (one seed)"
    assert verdict(low | {"direction": "none", "would_see": 0.0}) == "not decided (no seed differs)"
    assert verdict(low | {"direction": ""}) == ""


def test_a_table_from_before_power_was_told_is_read(planner: AblationPlanner, tmp_path: Path) -> None:
    finish(planner, SCORES)
    write_results(planner.table, collect(planner, EVERY), {}, PROVENANCE, tmp_path / "small.csv")
    lines = (tmp_path / "small.csv").read_text().splitlines()
    (tmp_path / "old.csv").write_text("".join(f"{line.rpartition(',')[0]}\n" for line in lines))
    rows, _ = read_results(tmp_path / "old.csv")
    assert [math.isnan(row["would_see"]) for row in rows] == [True] * 3
    assert [row["mean"] for row in rows] == [row["mean"] for row in read_results(tmp_path / "small.csv")[0]]


def test_three_seeds_by_hand() -> None:
    """t(0.975, 2) is 4.302653 in every table."""
    found = t_interval([1.0, 2.0, 6.0])
    half = 4.302653 * math.sqrt(7.0) / math.sqrt(3)
    assert (found.mean, found.seeds) == (3.0, 3)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), rel=1e-6)


@given(SAMPLES)
def test_it_is_scipys_interval(values: list[float]) -> None:
    found = t_interval(values)
    assert found.mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    if error > 1e-6:
        low, high = scipy.stats.t.interval(0.95, len(values) - 1, found.mean, error)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6, abs=1e-6)


@given(SAMPLES, st.floats(-100, 100), st.sampled_from([-3.0, 0.5, 2.0]))
def test_it_moves_and_stretches_with_the_values(values: list[float], shift: float, scale: float) -> None:
    before = t_interval(values)
    after = t_interval([scale * value + shift for value in values])
    ends = sorted((scale * before.low + shift, scale * before.high + shift))
    assert [after.low, after.high] == pytest.approx(ends, rel=1e-6, abs=1e-6)


@given(SAMPLES)
def test_the_order_of_seeds_does_not_matter(values: list[float]) -> None:
    assert t_interval(values) == t_interval(values[::-1])


def test_one_seed_has_no_interval() -> None:
    found = t_interval([4.0])
    assert found.mean == 4.0
    assert math.isnan(found.low)
    assert math.isnan(found.high)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf, 1.0]])
def test_what_is_no_number_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        t_interval(values)


def test_a_pair_is_of_the_seeds_that_both_have() -> None:
    found = paired({0: 1.0, 1: 5.0, 2: 9.0}, {1: 4.0, 2: 7.0, 3: 0.0})
    assert found == t_interval([1.0, 2.0])
    assert paired({0: 1.0}, {1: 1.0}) is None


@given(SAMPLES, NUMBERS)
def test_what_a_seed_adds_to_both_cancels(values: list[float], shift: float) -> None:
    """What makes a seed easy for both rows does not widen the interval of their difference."""
    first = dict(enumerate(values))
    found = paired({seed: value + shift for seed, value in first.items()}, first)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((shift, shift), abs=1e-6)


@pytest.mark.parametrize(
    ("values", "paper", "better", "paper_better", "expected"),
    [
        ([1.0, 1.1, 0.9], 2.0, "lower", "lower", "same"),
        ([-1.0, -1.1, -0.9], 2.0, "lower", "lower", "opposite"),
        ([-1.0, -1.1, -0.9], 2.0, "higher", "lower", "same"),
        ([1.0, -1.0, 0.5], 2.0, "lower", "lower", "none"),
        ([1.0], 2.0, "lower", "lower", "none"),
        ([0.0, 0.0], 2.0, "lower", "lower", "none"),
        ([1.0, 1.1, 0.9], None, "lower", "lower", ""),
        ([0.0, 0.0], 0.0, "lower", "lower", ""),
    ],
)
def test_direction(values, paper, better, paper_better, expected) -> None:  # type: ignore[no-untyped-def]
    assert direction(t_interval(values), paper, better, paper_better) == expected


@given(st.lists(NUMBERS, min_size=2, max_size=5), st.sampled_from([-2.0, 2.0]))
def test_direction_does_not_depend_on_the_sign_convention(values: list[float], paper: float) -> None:
    """Counting points lost instead of points won turns both signs and both senses of better."""
    turned = t_interval([-value for value in values])
    there = direction(t_interval(values), paper, "higher", "higher")
    assert direction(turned, -paper, "lower", "lower") == there
    assert direction(turned, paper, "lower", "higher") == there


def test_nothing_to_compare_with() -> None:
    assert direction(None, 1.0, "lower", "lower") == ""


@pytest.mark.parametrize("count", [3, 5, 10])
def test_the_difference_that_would_be_seen_is_seen_in_four_cases_of_five(count: int) -> None:
    spread, trials = 2.5, 3000
    effect = noncentrality(count) * spread / math.sqrt(count)
    draws = np.random.default_rng(count).normal(effect, spread, (trials, count))
    seen = sum(interval.low > 0 or interval.high < 0 for interval in map(t_interval, draws.tolist()))
    assert seen / trials == pytest.approx(0.8, abs=4 * math.sqrt(0.8 * 0.2 / trials))


def test_the_difference_that_would_be_seen_by_the_books() -> None:
    # Ten pairs need an effect of 0.996 standard deviations, five of 1.682, as G*Power says.
    assert [noncentrality(count) / math.sqrt(count) for count in (10, 5)] == pytest.approx([0.996, 1.682], abs=1e-3)
    assert noncentrality(10_000) == pytest.approx(1.96 + 0.8416, abs=1e-2)  # the normal distribution's
    with pytest.raises(ValueError, match="two seeds"):
        noncentrality(1)
    values = [0.5, -0.25, 1.0, 0.75, 0.125]
    error = statistics.stdev(values) / math.sqrt(5)
    assert detectable(t_interval(values)) == pytest.approx(noncentrality(5) * error)
    assert detectable(t_interval([1.0, 1.0])) == 0
    assert detectable(t_interval([1.0])) is None
    assert detectable(None) is None
