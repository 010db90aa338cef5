"""The graph of stages: what is shared, what a hash depends on, and the order."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from luve_lightning.ablations.graph import AblationPlanner, Plan, as_text, own_uses, together, without
from luve_lightning.ablations.stage_process import write_done
from tests.helpers.ablations import ROWS, TABLE, planner_of, write_table


def named(plan: Plan) -> dict[tuple[str, str, int], str]:
    """Digest by stage, row and seed."""
    return {(s.name, row, seed): digest for digest, s in plan.stages.items() for row, seed in s.uses}


def everything(planner: AblationPlanner) -> dict[int, list[str]]:
    return {seed: list(planner.table.rows) for seed in planner.table.seeds}


def test_what_agrees_is_run_once(planner: AblationPlanner) -> None:
    plan = planner.plan(everything(planner))
    found = named(plan)
    counts: dict[str, int] = {}
    for stage in plan.stages.values():
        counts[stage.name] = counts.get(stage.name, 0) + 1
    # data has no seed; plain needs no expert; one evaluation a seed.
    assert counts == {"data": 1, "expert": 2, "generate": 6, "evaluate": 2}
    assert found["expert", "full", 0] == found["expert", "low", 0] != found["expert", "full", 1]
    assert ("expert", "plain", 0) not in found
    assert found["data", "full", 0] == found["data", "low", 1]
    assert len({stage.folder for stage in plan.stages.values()}) == len(plan.stages)


def test_each_stage_comes_after_those_it_needs(planner: AblationPlanner) -> None:
    plan = planner.plan(everything(planner))
    seen: set[str] = set()
    for digest, stage in plan.stages.items():
        assert set(stage.needs) <= seen
        seen.add(digest)
    levels = plan.levels()
    # plain's videos need nothing.
    assert [sorted({stage.name for stage in level}) for level in levels] == [
        ["data", "generate"],
        ["expert"],
        ["generate"],
        ["evaluate"],
    ]
    assert sum(map(len, levels)) == len(plan.stages)


def test_the_command_has_real_folders(planner: AblationPlanner) -> None:
    plan = planner.plan({1: ["low"]})
    stages = {stage.name: stage for stage in plan.stages.values()}
    generate, expert = stages["generate"], stages["expert"]
    assert generate.words == (
        *("generate", "--output", str(generate.folder), "--seed", "1"),
        *("--value", "3.0", "--expert", str(expert.folder)),
    )
    assert expert.folder.name == f"expert-{expert.digest[:12]}"
    evaluate = stages["evaluate"]
    assert evaluate.words[3:5] == ("--videos.low", str(generate.folder))
    assert evaluate.words[-1] == str(planner.root / "cache")


def test_a_row_gives_its_own_value_of_what_is_given_for_each(tmp_path: Path) -> None:
    rows = ROWS | {"low": {"stages": {"evaluate": {"options": {"videos.{row}": "{generate}/bicubic"}}}}}
    planner = planner_of(write_table(tmp_path / "t", rows=rows), tmp_path / "runs")
    for order in (["low", "full"], ["full", "low"]):
        stages = planner.plan({0: order}).stages.values()
        [evaluate] = [stage for stage in stages if stage.name == "evaluate"]
        folders = {row: str(s.folder) for s in stages if s.name == "generate" for row, _ in s.uses}
        words = dict(zip(evaluate.words[1::2], evaluate.words[2::2], strict=True))
        assert words["--videos.low"] == f"{folders['low']}/bicubic"
        assert words["--videos.full"] == folders["full"]


def test_the_root_and_the_rows_name_are_not_in_a_hash(tmp_path: Path, planner: AblationPlanner) -> None:
    other = planner_of(write_table(tmp_path / "other"), tmp_path / "elsewhere")
    rows = everything(planner)
    assert list(other.plan(rows).stages) == list(planner.plan(rows).stages)


def digest(planner: AblationPlanner, stage: str, row: str = "full") -> str:
    return named(planner.plan({0: [row]}))[stage, row, 0]


@pytest.mark.parametrize(
    ("path", "value", "changed"),
    [
        (["settings", "value"], 6.0, {"generate", "evaluate"}),
        (["stages", "data", "verb"], "upsample", {"data", "expert", "generate", "evaluate"}),
        (["stages", "expert", "options", "lr"], 0.1, {"expert", "generate", "evaluate"}),
        (["stages", "evaluate", "options", "replicates"], 3, {"evaluate"}),
        (["title"], "Another", set()),
    ],
)
def test_a_change_reaches_what_comes_after_it(
    tmp_path: Path, planner: AblationPlanner, path: list[str], value: Any, changed: set[str]
) -> None:
    table = deepcopy(TABLE)
    node = table
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    other = planner_of(write_table(tmp_path / "other", table), tmp_path / "runs")
    stages = ["data", "expert", "generate", "evaluate"]
    assert {name for name in stages if digest(planner, name) != digest(other, name)} == changed


def test_a_hash_follows_the_composed_configuration_and_what_it_names(tmp_path: Path) -> None:
    model, clips, config = tmp_path / "model", tmp_path / "clips", tmp_path / "base.yaml"
    for folder in (model, clips):
        folder.mkdir()
    (model / "config.json").write_text("{}")
    (model / "weights.safetensors").write_text("1")
    index = tmp_path / "index.csv"
    index.write_text("a")
    config.write_text(yaml.safe_dump({"backbone": str(model), "index": str(index), "store": str(clips), "lr": 1}))
    table = deepcopy(TABLE)
    table["stages"]["data"]["config"] = [str(config)]
    folder = write_table(tmp_path / "small", table)

    def now() -> str:
        return digest(planner_of(folder, tmp_path / "runs"), "data")

    first = now()
    assert now() == first
    (model / "README.md").write_text("no model file")
    assert now() == first
    (model / "weights.safetensors").write_text("2")
    second = now()
    assert second != first
    index.write_text("b")
    third = now()
    assert third not in (first, second)
    for number in range(40):  # a store: its entries are named by what they depend on
        (clips / f"{number}.bin").write_text("x")
    store = now()
    (clips / "more.bin").write_text("x")
    assert now() == store
    for number in range(33, 40):
        (clips / f"{number}.bin").unlink()
    (clips / "more.bin").unlink()
    (clips / "file_hashes.jsonl").write_text("{}")  # whichever of the files is listed first
    assert now() == store
    config.write_text(config.read_text() + "# a comment\n")
    assert now() == store
    config.write_text(config.read_text().replace("lr: 1", "lr: 2"))
    assert now() != store


def test_a_stage_for_all_rows_is_of_the_rows_that_there_are(planner: AblationPlanner) -> None:
    both, one = planner.plan({0: ["full", "low"]}), planner.plan({0: ["low"]})
    assert both.goals["low", 0, "evaluate"] != one.goals["low", 0, "evaluate"]
    assert both.goals["low", 0, "evaluate"] == both.goals["full", 0, "evaluate"]
    assert named(both)["generate", "low", 0] == named(one)["generate", "low", 0]
    assert planner.plan({0: []}).stages == {}
    assert without({0: ["full", "low"], 1: ["low"]}, {("low", 0)}) == {0: ["full"], 1: ["low"]}


def test_a_rows_own_stages_are_those_before_the_common_ones(planner: AblationPlanner) -> None:
    assert [s.name for s in planner.before_gathering("full", 0)] == ["data", "expert", "generate"]
    assert [s.name for s in planner.before_gathering("plain", 0)] == ["generate"]


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("data", {"output": "{outt}"}, r"stages.data.options.output: \{outt\}: expected \{seed\}, \{out\}"),
        ("data", {"loop": "{generate}"}, r"row full: stages depend on each other in a circle: evaluate, generate"),
        ("evaluate", {"other": "{generate}"}, r"stages.evaluate.options.other: \{generate\}: differs between rows"),
        ("evaluate", {"other": "{row}"}, r"stages.evaluate.options.other: \{row\}: differs between rows"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, stage: str, options: dict[str, str], message: str) -> None:
    table = deepcopy(TABLE)
    table["stages"][stage]["options"] |= options
    planner = planner_of(write_table(tmp_path / "bad", table), tmp_path / "runs")
    with pytest.raises(ValueError, match=message):
        planner.plan(everything(planner))


def test_a_stage_for_all_rows_may_take_up_one_that_they_share(tmp_path: Path) -> None:
    table = deepcopy(TABLE)
    table["stages"]["evaluate"]["options"]["reference"] = "{data}"
    planner = planner_of(write_table(tmp_path / "small", table), tmp_path / "runs")
    plan = planner.plan(everything(planner))
    [data] = [stage for stage in plan.stages.values() if stage.name == "data"]
    evaluations = [stage for stage in plan.stages.values() if stage.name == "evaluate"]
    assert len(evaluations) == 2
    for stage in evaluations:
        assert data.digest in stage.needs
        assert str(data.folder) in stage.words
    assert {row for row, _ in data.uses} == set(ROWS)


def test_a_prompt_is_null_in_a_file_only(tmp_path: Path) -> None:
    table = deepcopy(TABLE)
    table["stages"]["generate"]["options"] |= {"prompt": None}
    planner = planner_of(write_table(tmp_path / "bad", table), tmp_path / "runs")
    with pytest.raises(ValueError, match=r"stages.generate.options.prompt: on a command line null is a word"):
        planner.plan(everything(planner))


def test_a_dropped_stage_that_is_still_named_is_an_error(tmp_path: Path) -> None:
    rows = ROWS | {"low": {"stages": {"expert": None}}}
    planner = planner_of(write_table(tmp_path / "small", rows=rows), tmp_path / "runs")
    with pytest.raises(ValueError, match=r"stages.generate.options.expert: \{expert\}: expected"):
        planner.plan({0: ["low"]})


def test_another_hash_in_a_folder_is_not_taken_for_this_one(planner: AblationPlanner) -> None:
    from luve_lightning.ablations.stage_process import done_record

    [data] = [s for s in planner.plan({0: ["full"]}).stages.values() if s.name == "data"]
    assert done_record(data) is None
    write_done(data, {"seconds": 1.5})
    assert (done_record(data) or {})["seconds"] == 1.5
    data.digest = data.digest[:12] + "0" * 52
    assert done_record(data) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (0.5, "0.5"),
        (3, "3"),
        ("a b", "a b"),
        ([1, 2], "[1, 2]"),
        ({"a": 1}, '{"a": 1}'),
    ],
)
def test_values_as_the_command_line_takes_them(value: Any, text: str) -> None:
    assert as_text(value) == text


def test_plans_of_two_tables_are_one(tmp_path: Path) -> None:
    changed = deepcopy(TABLE) | {"rows": ["full"], "settings": {"value": 7.0}}
    plans = {}
    for name, table in (("small", TABLE), ("second", changed)):
        planner = planner_of(write_table(tmp_path / name, table), tmp_path / "runs")
        plans[name] = planner.plan({0: list(table["rows"])})
    found = together(plans)
    assert len(found.stages) == len(set(plans["small"].stages) | set(plans["second"].stages)) == 8
    [data] = [stage for stage in found.stages.values() if stage.name == "data"]
    assert data.uses == {("small/full", 0), ("small/low", 0), ("second/full", 0)}
    assert own_uses("small", data.uses) == {("full", 0): ("small/full", 0), ("low", 0): ("small/low", 0)}
    for name, plan in plans.items():
        assert data.digest in plan.stages
        assert all("/" not in row for stage in plan.stages.values() for row, _ in stage.uses), "left as they are"
        for (row, seed, stage), digest in plan.goals.items():
            assert found.goals[f"{name}/{row}", seed, stage] == digest
    seen: set[str] = set()
    for digest, stage in found.stages.items():
        assert set(stage.needs) <= seen
        seen.add(digest)


def test_one_stage_under_two_names_is_refused(tmp_path: Path) -> None:
    other = json.loads(json.dumps(TABLE).replace('"data"', '"clips"').replace("{data}", "{clips}"))
    plans = {
        name: planner_of(write_table(tmp_path / name, table), tmp_path / "runs").plan({0: ["full"]})
        for name, table in (("small", TABLE), ("second", other))
    }
    with pytest.raises(ValueError, match=r"second: clips-\w{12} is data-\w{12} in a table before it; run it by itself"):
        together(plans)
