"""Tables as files: what is laid over what, and what is refused."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from luve_lightning.ablations.table import merged, read_table
from tests.helpers.ablations import ROWS, TABLE, write_table


def test_a_row_is_the_table_with_its_differences(tmp_path: Path) -> None:
    table = read_table(write_table(tmp_path / "small"))
    assert (table.name, table.seeds, table.reference) == ("small", (0, 1), "full")
    assert list(table.rows) == ["full", "low", "plain"]
    values = {name: row.stages["generate"].options["value"] for name, row in table.rows.items()}
    assert values == {"full": 5.0, "low": 3.0, "plain": 5.0}
    assert table.rows["plain"].stages["generate"].options["expert"] is None
    assert table.rows["plain"].title == "plain words"
    assert table.rows["low"].paper == {"Score": 8.0}
    assert [stage.name for stage in table.rows["full"].stages.values() if stage.gathers] == ["evaluate"]
    metric = table.metrics["score"]
    assert (metric.stage, metric.column, metric.method) == ("evaluate", "score", "{row}")


def test_a_rows_option_comes_after_the_tables(tmp_path: Path) -> None:
    """`filter: null` must follow `filter.cutoff: 0.5`, or the command line sets a key inside of nothing."""
    table = deepcopy(TABLE)
    table["stages"]["expert"]["options"] |= {"a.filter.cutoff": 1, "a.rank": 4}
    rows = deepcopy(ROWS)
    rows["low"]["stages"] = {"expert": {"options": {"a.rank": 8, "a.filter": None}}}
    options = read_table(write_table(tmp_path, table, rows)).rows["low"].stages["expert"].options
    assert list(options)[-3:] == ["a.filter.cutoff", "a.rank", "a.filter"]


def test_changes_are_laid_over_the_table_and_under_the_rows(tmp_path: Path) -> None:
    table = read_table(write_table(tmp_path), {"settings": {"value": 7.0}, "world": "elsewhere"})
    assert table.rows["full"].stages["generate"].options["value"] == 7.0
    assert table.rows["low"].stages["generate"].options["value"] == 3.0
    assert (table.world, dict(table.settings)) == ("elsewhere", {"value": 7.0})


def test_extends_lays_a_table_over_another_file(tmp_path: Path) -> None:
    base, own = (deepcopy(TABLE), {"extends": "../base.yaml", "title": "Another", "metrics": {"score": {"unit": "m"}}})
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    table = read_table(write_table(tmp_path / "another", own))
    assert (table.title, table.metrics["score"].unit, table.metrics["score"].paper) == ("Another", "m", "Score")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"extends": "base.yaml"}))
    with pytest.raises(ValueError, match="extends this file itself"):
        read_table(tmp_path / "another")


def test_a_metric_or_a_stage_of_null_is_dropped(tmp_path: Path) -> None:
    table = deepcopy(TABLE)
    table["metrics"]["other"] = None
    rows = deepcopy(ROWS)
    rows["plain"]["stages"]["expert"] = None
    found = read_table(write_table(tmp_path, table, rows))
    assert list(found.metrics) == ["score"]
    assert "expert" not in found.rows["plain"].stages
    assert "expert" in found.rows["full"].stages


def edited(path: list[str], value: Any, tree: dict[str, Any] = TABLE) -> dict[str, Any]:
    tree = deepcopy(tree)
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["titel"], "x", r"table.yaml: titel: unknown key; known: extends, title"),
        (["world"], None, r"world: required, but not given"),
        (["reference"], "fll", r"reference: expected one of full, low, plain, got 'fll'"),
        (["rows"], ["full", "Bad name"], r"rows: 'Bad name': expected a name of small letters"),
        (["rows"], ["full", "missing"], r"rows: no such file: .*missing.yaml"),
        (["seeds"], [0, 0], r"seeds: expected different whole numbers"),
        (["seeds"], [-1], r"seeds: expected different whole numbers"),
        (
            ["metrics", "score", "better"],
            "more",
            r"metrics.score.better: expected higher, lower or neither, got 'more'",
        ),
        (["metrics", "score", "better"], "neither", r"metrics.score.paper: expected none, because neither direction"),
        (["metrics", "score", "stage"], "judge", r"metrics.score.stage: row full has no judge"),
        (["stages", "data", "verbs"], "x", r"stages.data.verbs: unknown key; known: verb, config, options"),
        (["stages", "data", "config"], "a.yaml", r"stages.data: expected a list of files"),
        (["stages", "seed"], {"verb": "fit"}, r"stages.seed: \{seed\} means something else already"),
        (
            ["stages", "generate", "options", "value"],
            "${settings.valu}",
            r"Interpolation key 'settings.valu' not found",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, path: list[str], value: Any, message: str) -> None:
    folder = write_table(tmp_path, edited(path, value))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        read_table(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"papers": {}}, r"low.yaml: papers: unknown key"),
        ({"paper": {"Score": "8"}}, r"low.yaml: paper: expected numbers"),
        ({"stages": {"evaluate": {"options": {"replicates": 1}}}}, r"stages.evaluate runs once for all rows, but full"),
        ({"stages": {"evaluate": None}}, r"metrics.score.stage: row low has no evaluate"),
    ],
)
def test_mistakes_of_a_row_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    folder = write_table(tmp_path, rows=ROWS | {"low": row})
    with pytest.raises(ValueError, match=message):
        read_table(folder)


def test_yaml_that_is_none_is_named_with_its_line(tmp_path: Path) -> None:
    folder = write_table(tmp_path)
    (folder / "low.yaml").write_text("title: a\nstages: [\n")
    with pytest.raises(ValueError, match=r"low.yaml:3: not valid YAML"):
        read_table(folder)


def test_merging_keeps_what_is_not_named() -> None:
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    assert merged(base, {"a": {"y": [3]}, "c": None}) == {"a": {"x": 1, "y": [3]}, "b": 1, "c": None}
    assert base == {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    assert merged(base, {"a": None}) == {"a": None, "b": 1}
