"""Stages as processes: order, slots, failures, kills and what the next run does."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from luve_lightning.ablations.graph import AblationPlanner, together, without
from luve_lightning.ablations.runners import LocalRunner, Outcome, Slots
from luve_lightning.ablations.stage_process import done_record, is_done, is_whole, lock_folder, log_path, run_stage
from tests.helpers.ablation_process import start_run
from tests.helpers.ablations import (
    PROGRAM,
    ROWS,
    TABLE,
    Notes,
    events,
    keep_numbers_alone,
    planner_of,
    started,
    write_table,
)
from tests.helpers.waiting import wait_for


def with_options(changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    table = deepcopy(TABLE)
    for stage, options in changes.items():
        table["stages"][stage]["options"] |= options
    return table


def run(planner: AblationPlanner, slots: Slots | None = None, watcher: Notes | None = None) -> Outcome:
    rows = {seed: list(planner.table.rows) for seed in planner.table.seeds}
    make = lambda lost: planner.plan(without(rows, lost))  # noqa: E731
    return LocalRunner(make, slots or Slots(3), PROGRAM, {"revision": "abc"}, watcher or Notes()).run()


def test_every_stage_runs_once_after_those_it_needs(tmp_path: Path, log: Path) -> None:
    planner, watcher = planner_of(write_table(tmp_path / "small"), tmp_path / "runs"), Notes()
    assert run(planner, watcher=watcher) == Outcome([], {})
    plan = planner.plan({seed: list(ROWS) for seed in (0, 1)})
    assert sorted(started(log)) == sorted(stage.folder.name for stage in plan.stages.values())
    ended: set[str] = set()
    for event in events(log):
        if event["event"] == "end":
            ended.add(event["stage"])
            continue
        [stage] = [s for s in plan.stages.values() if s.folder.name == event["stage"]]
        assert {plan.stages[need].folder.name for need in stage.needs} <= ended
    assert len(watcher.done) == 11
    assert watcher.last is not None
    assert (watcher.last.done, watcher.last.total, watcher.last.seconds_left) == (11, 11, 0)
    for stage in plan.stages.values():
        record = done_record(stage)
        assert record is not None
        assert record["revision"] == "abc"
        assert record["command"].endswith(" ".join(stage.words))
        assert log_path(stage).read_text().startswith("$ ")


@pytest.mark.slow
def test_a_second_run_starts_nothing_and_another_row_only_its_own(tmp_path: Path, log: Path) -> None:
    folder = write_table(tmp_path / "small")
    run(planner_of(folder, tmp_path / "runs"))
    before = len(started(log))
    run(planner_of(folder, tmp_path / "runs"))
    assert len(started(log)) == before
    write_table(folder, TABLE | {"rows": [*ROWS, "high"]}, ROWS | {"high": {"settings": {"value": 6.0}}})
    run(planner_of(folder, tmp_path / "runs"))
    names = [name.partition("-")[0] for name in started(log)[before:]]
    assert sorted(names) == ["evaluate", "evaluate", "generate", "generate"]


def test_without_weights_and_videos_only_what_an_unfinished_row_needs_is_made_again(tmp_path: Path, log: Path) -> None:
    planner = planner_of(write_table(tmp_path / "small"), tmp_path / "runs")
    run(planner)
    plan = planner.plan({seed: list(ROWS) for seed in (0, 1)})
    for checkpoint in (tmp_path / "runs").rglob("last.ckpt"):
        checkpoint.unlink()
    assert all(map(is_whole, plan.stages.values())), "checkpoints are for going on"
    keep_numbers_alone(tmp_path / "runs")
    before = len(started(log))
    run(planner)
    assert len(started(log)) == before
    (plan.stages[plan.goals["full", 0, "evaluate"]].folder / "table.json").unlink()
    # Where that fails, the other seed keeps its numbers.
    rows = {seed: list(ROWS) for seed in (0, 1)}
    runner = LocalRunner(lambda lost: planner.plan(without(rows, lost)), Slots(3), ("false",), {}, Notes())
    assert {seed for _, seed in runner.run().lost} == {0}
    assert run(planner) == Outcome([], {})
    again = [stage for stage in plan.stages.values() if stage.folder.name in started(log)[before:]]
    assert sorted(stage.name for stage in again) == ["data", "evaluate", "expert", "generate", "generate", "generate"]
    assert len(started(log)) == before + len(again)
    assert all((0 in {seed for _, seed in stage.uses}) and is_whole(stage) for stage in again)


def test_half_a_result_is_not_taken_for_the_whole_that_was_there(tmp_path: Path, log: Path) -> None:
    planner = planner_of(write_table(tmp_path / "small"), tmp_path / "runs")
    [data] = [s for s in planner.plan({0: ["full"]}).stages.values() if s.name == "data"]
    assert run_stage(data, PROGRAM, {}, {}) is None
    assert is_whole(data)
    (data.folder / "value.txt").unlink()
    assert run_stage(data, ("false",), {}, {}) is not None
    (data.folder / "value.txt").write_text("9.9")  # as large as the whole
    assert (is_done(data), is_whole(data)) == (True, False)
    assert run_stage(data, PROGRAM, {}, {}) is None
    assert is_whole(data)
    (data.folder / "value.txt").write_text("")
    assert not is_whole(data), "an interrupted copy"


@pytest.mark.slow
def test_a_failing_row_stops_no_other(tmp_path: Path, log: Path) -> None:
    rows = deepcopy(ROWS)
    rows["low"]["stages"] = {"generate": {"options": {"fail": True}}}
    folder, watcher = write_table(tmp_path / "small", rows=rows), Notes()
    planner = planner_of(folder, tmp_path / "runs")
    outcome = run(planner, watcher=watcher)
    assert set(outcome.lost) == {("low", 0), ("low", 1)}
    assert [failure.code for failure in watcher.failures] == [3, 3]
    assert watcher.failures[0].tail == ("first line", "it broke here")
    assert outcome.lost["low", 0].reason == "generate ended with exit status 3: it broke here"
    plan = planner.plan({seed: ["full", "plain"] for seed in (0, 1)})
    assert all(map(is_done, plan.stages.values())), "the evaluation is of the rows that are left"
    # Once more: only what failed; mended, it and the evaluations of all rows.
    before = len(started(log))
    run(planner)
    assert [name.partition("-")[0] for name in started(log)[before:]] == ["generate", "generate"]
    before = len(started(log))
    assert run(planner_of(write_table(folder), tmp_path / "runs")).failures == []
    names = sorted(name.partition("-")[0] for name in started(log)[before:])
    assert names == ["evaluate", "evaluate", "generate", "generate"]


def test_what_all_rows_need_fails_all_of_them(tmp_path: Path, log: Path) -> None:
    table = with_options({"data": {"fail": True}})
    planner = planner_of(write_table(tmp_path / "small", table), tmp_path / "runs")
    outcome = run(planner)
    assert set(outcome.lost) == {(row, seed) for row in ("full", "low") for seed in (0, 1)}
    assert len(outcome.failures) == 1
    plan = planner.plan({0: ["plain"], 1: ["plain"]})
    assert all(map(is_done, plan.stages.values()))


def test_slots_run_side_by_side_with_their_share_of_the_machine(tmp_path: Path, log: Path) -> None:
    """Each generation waits for a file that is written when three of them run at the same time."""
    table = with_options({"generate": {"wait": str(tmp_path / "go")}})
    planner = planner_of(write_table(tmp_path / "small", table), tmp_path / "runs")
    watcher = Notes()

    class Together(Notes):
        def standing(self, standing: Any) -> None:
            if standing.running.get("generate") == 3:
                (tmp_path / "go").touch()
            assert sum(standing.running.values()) <= 3

    run(planner, Slots(3, ("4", "7"), cores=13), Together())
    del watcher
    starts = [event["env"] for event in events(log) if event["event"] == "start"]
    assert {env["OMP_NUM_THREADS"] for env in starts} == {"4"}
    assert {env["CUDA_VISIBLE_DEVICES"] for env in starts} == {"4", "7"}


def test_a_slots_environment() -> None:
    slots = Slots(4, ("0", "1"), 2)
    assert [slots.environment(n)["CUDA_VISIBLE_DEVICES"] for n in range(4)] == ["0", "1", "0", "1"]
    assert slots.environment(0)["OMP_NUM_THREADS"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in Slots(2, ("0",), 8).environment(1)


def test_a_free_slot_is_of_the_gpu_on_which_least_runs() -> None:
    slots = Slots(6, ("0", "1"), 2)
    assert slots.free([]) == 0
    assert slots.free([0, 2]) == 1
    assert slots.free([0, 1, 3]) == 2
    assert slots.free(range(6)) is None
    assert Slots(2).free([0]) == 1


@pytest.mark.parametrize("first", ["one", "other"])
def test_what_takes_longest_is_begun_first(tmp_path: Path, log: Path, first: str) -> None:
    """What takes how long is read from what an earlier run has made: of another seed here."""
    table = deepcopy(TABLE)
    fit = {"verb": "fit", "options": {"trainer.default_root_dir": "{out}", "seed": "{seed}"}}
    table["stages"] |= {"one": fit, "other": deepcopy(fit) | {"options": fit["options"] | {"trainer.max_steps": 9}}}
    table["stages"]["generate"]["options"] |= {"expert": "{one}", "more": "{other}"}
    planner = planner_of(write_table(tmp_path / "small", table | {"rows": ["full"]}), tmp_path / "runs")
    LocalRunner(lambda _: planner.plan({0: ["full"]}), Slots(4), PROGRAM, {}, Notes()).run()
    for file in (tmp_path / "runs" / "stages").glob("*/done.json"):
        record = json.loads(file.read_text())
        file.write_text(json.dumps(record | {"seconds": 50 if record["stage"] == first else 5}))
    before = len(started(log))
    LocalRunner(lambda _: planner.plan({0: ["full"], 1: ["full"]}), Slots(1), PROGRAM, {}, Notes()).run()
    names = [name.partition("-")[0] for name in started(log)[before:]]
    last = {"one": "other", "other": "one"}[first]
    assert names == [first, last, "generate", "evaluate"]


@pytest.mark.parametrize("tables", [["short", "long"], ["long", "short"]])
def test_tables_come_in_their_order_whatever_takes_longer(tmp_path: Path, log: Path, tables: list[str]) -> None:
    plans = {}
    for name in tables:
        table = deepcopy(TABLE) | {"rows": ["full"]}
        table["stages"]["expert"]["options"] |= {"trainer.max_steps": len(name)}
        planner = planner_of(write_table(tmp_path / name, table), tmp_path / "runs")
        plans[name] = planner.plan({0: ["full"], 1: ["full"]})
    LocalRunner(lambda _: together(plans), Slots(1), PROGRAM, {}, Notes()).run()
    own = [{stage.folder.name for stage in plans[name].stages.values()} for name in tables]
    assert set(started(log)[: len(own[0])]) == own[0]
    assert set(started(log)) == own[0] | own[1] > own[0]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_killed_run_goes_on_without_repeating_a_finished_stage(tmp_path: Path, log: Path) -> None:
    """kill -9 of the runner while an expert is trained: that process lives on and holds its folder."""
    folder = write_table(tmp_path / "small", with_options({"expert": {"wait": str(tmp_path / "go")}}))
    process = start_run(folder, tmp_path / "runs", log)
    try:
        assert wait_for(lambda: any("expert" in name for name in started(log)))
    finally:
        process.kill()
        process.join()
    [orphan] = [e["pid"] for e in events(log) if "expert" in e["stage"]]
    assert alive(orphan)
    planner = planner_of(folder, tmp_path / "runs")
    plan = planner.plan({seed: list(ROWS) for seed in (0, 1)})
    taken = next(s for s in plan.stages.values() if s.folder.name in started(log) and s.name == "expert")
    assert not is_done(taken)
    assert lock_folder(taken) is None, "the orphan holds it"
    before = [name for name in started(log) if "expert" not in name]
    finished = {s.folder.name for s in plan.stages.values() if is_done(s)}
    assert any(name.startswith("data") for name in finished)
    (tmp_path / "go").touch()
    assert run(planner).failures == []
    assert all(map(is_done, plan.stages.values()))
    again = started(log)[len(before) + 1 :]
    assert not finished & set(again)
    # The orphan's checkpoint is where its stage goes on.
    resumed = [e for e in events(log) if e["stage"] == taken.folder.name and e["event"] == "start"][-1]
    assert resumed["options"]["ckpt_path"] == "last"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_stages_too(tmp_path: Path, log: Path, number: signal.Signals, code: int) -> None:
    folder = write_table(tmp_path / "small", with_options({"expert": {"wait": str(tmp_path / "never")}}))
    process = start_run(folder, tmp_path / "runs", log)
    try:
        assert wait_for(lambda: any("expert" in name for name in started(log)))
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(150)
        assert process.exitcode == code
    finally:
        process.kill()
    [pid] = {e["pid"] for e in events(log) if "expert" in e["stage"]}
    assert wait_for(lambda: not alive(pid))
    planner = planner_of(folder, tmp_path / "runs")
    stages = planner.plan({seed: list(ROWS) for seed in (0, 1)}).stages.values()
    assert not any(is_done(stage) for stage in stages if stage.name == "expert")
    assert sum(map(is_done, stages)) >= 1


@pytest.mark.slow
def test_a_stage_of_another_program_is_waited_for(tmp_path: Path, log: Path) -> None:
    planner = planner_of(write_table(tmp_path / "small"), tmp_path / "runs")
    [data] = [s for s in planner.plan({0: ["full"]}).stages.values() if s.name == "data"]
    lock = lock_folder(data)
    assert lock is not None

    class Releases(Notes):
        def finished(self, stage: Any, seconds: float, standing: Any) -> None:
            super().finished(stage, seconds, standing)
            if self.done == ["generate", "generate"]:  # plain's, which need nothing
                os.close(lock)

    watcher = Releases()
    assert run(planner, watcher=watcher).failures == []
    assert watcher.done[2] == "data"


def test_one_stage_by_itself(tmp_path: Path, log: Path) -> None:
    planner = planner_of(write_table(tmp_path / "small"), tmp_path / "runs")
    [data] = [s for s in planner.plan({0: ["full"]}).stages.values() if s.name == "data"]
    assert run_stage(data, PROGRAM, {}, {}) is None
    assert run_stage(data, PROGRAM, {}, {}) is None
    assert len(started(log)) == 1
    failing = planner_of(write_table(tmp_path / "bad", with_options({"data": {"fail": True}})), tmp_path / "runs")
    [data] = [s for s in failing.plan({0: ["full"]}).stages.values() if s.name == "data"]
    failure = run_stage(data, PROGRAM, {}, {})
    assert failure is not None
    assert failure.tail[-1] == "it broke here"
    assert lock_folder(data) is not None, "let go of"
