"""What a video of a row costs: from plans and records to the table's files and the plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from matplotlib.collections import LineCollection
from matplotlib.text import Annotation

from luve_lightning.ablations.costs import add_costs, cost_markdown, draw_costs, recorded_seconds, write_cost_plot
from luve_lightning.ablations.graph import AblationPlanner, AblationStage
from luve_lightning.ablations.results import ResultsProvenance, collect, read_results, result_rows, write_results
from luve_lightning.ablations.stage_process import write_done
from luve_lightning.ablations.table import read_table
from tests.helpers.ablations import ROWS, TABLE, planner_of, write_table

SCORES = {"full": (5.0, 6.0), "low": (3.0, 4.75), "plain": (5.5, 5.5)}
EVERY = {seed: list(ROWS) for seed in (0, 1)}
PLANS = {5.0: 4e12, 3.0: 2e12}


def costly(folder: Path, rows: dict[str, Any] | None = None, **keys: Any) -> Path:
    return write_table(folder, deepcopy(TABLE) | {"cost": {"plots": ["score"]}, **keys}, rows)


def record(device: str = "cpu", **seconds: float | None) -> dict[str, Any]:
    """A video's, of stages that take so long; None is from a store."""
    stages = [{"stage": name, "latents": [1, 2], "seconds": value} for name, value in seconds.items()]
    own = {"embedding": 0.5, "storing": 9.0, "writing": 9.0}
    return {"recipe": {}, "stages": stages, "seconds": own, "device": device, "threads": 2}


def a_stage(folder: Path, **records: dict[str, Any]) -> AblationStage:
    stage = AblationStage("generate", folder.name * 8, folder, ("generate",), (), False)
    folder.mkdir()
    for name, content in records.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    write_done(stage, {"device": "x86_64 CPU"})
    return stage


def plan_video(words: Sequence[str], changes: Mapping[str, Any]) -> dict[str, Any]:
    value = changes.get("value", float(words[words.index("--value") + 1]))
    return {"flops": PLANS[value], "stages": [{"stage": "motion", "flops": PLANS[value]}]}


def finished(folder: Path, root: Path) -> AblationPlanner:
    """A table all of whose stages are done; seed 1's videos take a second longer."""
    planner = planner_of(folder, root)
    for stage in planner.plan(EVERY).stages.values():
        stage.folder.mkdir(parents=True)
        [*_, seed] = sorted({seed for _, seed in stage.uses})
        if stage.name == "evaluate":
            cells = {row: {"n": 1, "metrics": {"score": {"value": SCORES[row][seed]}}} for row in ROWS}
            (stage.folder / "table.json").write_text(json.dumps({"methods": cells, "not_run": {}}))
        if stage.name == "generate":
            for number in range(2):
                made = record(motion=1.0 + seed, decoded=float(number))
                (stage.folder / f"{number}.json").write_text(json.dumps(made))
        write_done(stage, {"seconds": 1.0, "device": "x86_64 CPU"})
    return planner


def test_seconds_are_those_of_the_stages(tmp_path: Path) -> None:
    stage = a_stage(tmp_path / "a", one=record(motion=2.0, decoded=1.0), two=record("a GPU", motion=4.0, decoded=1.0))
    found = recorded_seconds(stage, [])
    assert found.videos == [3.5, 5.5]
    assert found.machines == {"x86_64 CPU, threads: 2", "a GPU"}
    assert (found.unknown, found.stored) == (0, set())


def test_a_stored_stage_brings_the_seconds_of_the_run_that_made_it(tmp_path: Path) -> None:
    motion = a_stage(tmp_path / "m", one=record("a GPU", motion=8.0), three=record(motion=None))
    other = record(motion=7.0)
    other["stages"][0]["latents"] = [9, 9]  # another size
    smaller = a_stage(tmp_path / "s", one=other)
    stage = a_stage(
        tmp_path / "g",
        one=record(motion=None, refined=1.0),
        two=record(motion=None, refined=1.0),  # nobody's
        three=record(motion=None, refined=1.0),  # nor there
    )
    found = recorded_seconds(stage, [smaller, motion])
    assert found.videos == [9.5]
    assert (found.unknown, found.stored) == (2, {"motion"})
    assert found.machines == {"a GPU", "x86_64 CPU, threads: 2"}


def test_costs_stand_beside_quality(tmp_path: Path) -> None:
    rows = deepcopy(ROWS)
    rows["plain"]["cost"] = {"plan": {"value": 3.0}, "note": "half of it"}
    planner = finished(costly(tmp_path / "small", rows), tmp_path / "runs")
    results = collect(planner, EVERY)
    assert set(results.values["full"][0]) == {"score"}
    add_costs(results, planner, EVERY, plan_video)
    found = {(row["row"], row["metric"]): row for row in result_rows(planner.table, results.values)}
    assert [found[row, "tflop"]["mean"] for row in ROWS] == [4.0, 2.0, 2.0]
    assert found["low", "tflop"]["difference"] == -2.0
    # Means of two videos are 2 and 3 s.
    assert (found["full", "seconds"]["mean"], found["full", "seconds"]["seeds"]) == (2.5, 2)
    assert ("plain", "seconds") not in found
    assert results.missing["seconds"] == "plain: its videos' records are of more than the row needs"
    text = "\n".join(cost_markdown(results.cost))
    assert "- full: TFLOP: motion 4; seconds of 4 videos on x86_64 CPU, threads: 2\n" in text
    assert text.endswith("- plain: TFLOP: motion 2; half of it")


def test_what_cannot_be_planned_is_said(tmp_path: Path) -> None:
    def refuse(words: Sequence[str], changes: Mapping[str, Any]) -> dict[str, Any]:
        raise ValueError("skips work")

    planner = finished(costly(tmp_path / "small"), tmp_path / "runs")
    results = collect(planner, EVERY)
    add_costs(results, planner, EVERY, refuse)
    assert results.missing == {"tflop": "full: skips work"}
    assert results.values["full"][0] == {"score": 5.0, "seconds": 2.0}


def test_the_files(tmp_path: Path) -> None:
    paper = {"Their table": {"Theirs": {"A": 95.7}, "Another": {"A": 95.68, "B": 2.0}}}
    planner = finished(costly(tmp_path / "small", paper=paper), tmp_path / "runs")
    results, table, path = collect(planner, EVERY), planner.table, tmp_path / "small.csv"
    add_costs(results, planner, EVERY, plan_video)
    write_results(table, results, {}, ResultsProvenance("luve ablate small", "abc", "a CPU", {}, "2026-01-01"), path)
    rows, content = read_results(path)
    assert {row["metric"] for row in rows} == {"score", "tflop", "seconds"}
    assert content["cost"]["low"]["tflop"] == {"motion": 2.0}
    assert content["paper"] == paper
    text = path.with_suffix(".md").read_text()
    assert "## tflop in TFLOP a video, lower is better" in text
    apart = text.index("## The paper's own numbers")
    assert text.index("| Theirs | 95.70 |  |\n| Another | 95.68 | 2 |") > apart
    assert "Theirs" not in text[:apart] + path.read_text()
    lines = result_rows(table, results.values)
    png, svg = write_cost_plot(table, lines, path)
    assert png.read_bytes().startswith(b"\x89PNG")
    first = svg.read_bytes()
    write_cost_plot(table, lines, path)
    assert svg.read_bytes() == first, "the same numbers give the same file"


def test_a_point_a_row_with_its_interval_on_a_logarithmic_axis(tmp_path: Path) -> None:
    planner = finished(costly(tmp_path / "small"), tmp_path / "runs")
    results = collect(planner, EVERY)
    add_costs(results, planner, EVERY, plan_video)
    lines = result_rows(planner.table, results.values)
    figure = draw_costs(planner.table, lines)
    assert figure is not None
    flops, seconds = figure.axes
    assert (flops.get_xscale(), flops.get_xlabel(), seconds.get_xlabel()) == ("log", "TFLOP a video", "s a video")
    assert flops.get_ylabel() == "score, points (higher is better)"
    wanted = {line["row"]: (line["mean"], line["low"], line["high"]) for line in lines if line["metric"] == "score"}
    drawn = {text.get_text(): text.xy for text in flops.texts if isinstance(text, Annotation)}
    assert drawn == {row: (PLANS[3.0 if row == "low" else 5.0] / 1e12, mean) for row, (mean, _, _) in wanted.items()}
    ends = {
        tuple(segment[:, 1])
        for bars in flops.collections
        if isinstance(bars, LineCollection)
        for segment in bars.get_segments()
    }
    assert len(ends) == 2, "one row's seeds agree: no bar"
    for low, high in ends:
        assert any(math.isclose(low, own[1]) and math.isclose(high, own[2]) for own in wanted.values())


def test_a_table_that_does_not_ask_stays_as_it_is(tmp_path: Path) -> None:
    planner = finished(write_table(tmp_path / "small"), tmp_path / "runs")
    results = collect(planner, EVERY)
    add_costs(results, planner, EVERY, plan_video)
    assert (results.cost, results.values["full"][0]) == ({}, {"score": 5.0})
    assert write_cost_plot(planner.table, result_rows(planner.table, results.values), tmp_path / "small.csv") == []


@pytest.mark.parametrize(
    ("table", "row", "message"),
    [
        ({"cost": ["generate"]}, {}, "table.yaml: cost: expected stage and plots, got"),
        ({"cost": {"stages": "generate"}}, {}, "table.yaml: cost.stages: unknown key; known: stage, plots"),
        ({"cost": {"plots": ["beauty"]}}, {}, r"cost.plots: expected some of score, got \['beauty'\]"),
        ({"cost": {"stage": "video"}}, {}, "metrics.tflop.stage: row full has no video"),
        ({"paper": {"Table 1": {"LuVe": {"SC": "high"}}}}, {}, "paper: expected numbers by title, row and column"),
        ({"cost": {"stage": "generate"}}, {"plan": ["x"]}, "full.yaml: cost: expected options of luve plan"),
        ({}, {"note": "x"}, "full.yaml: cost: .*table.yaml does not ask for cost"),
    ],
)
def test_what_is_refused(tmp_path: Path, table: dict[str, Any], row: dict[str, Any], message: str) -> None:
    rows = deepcopy(ROWS)
    rows["full"] |= {"cost": row} if row else {}
    with pytest.raises(ValueError, match=message):
        read_table(write_table(tmp_path / "small", deepcopy(TABLE) | table, rows))
