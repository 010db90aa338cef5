"""A rehearsal of small real processes: stopped and resumed, failing in every way, interrupted and called again."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luve_lightning.ablations.rehearsal_run import RehearsalRun, only_rehearsal, plan_of
from luve_lightning.ablations.rehearsal_stage import RehearsalStage, StageResult
from luve_lightning.files import write_text
from luve_lightning.locks import try_lock

PROGRAM = (sys.executable, str(Path(__file__).resolve().parents[1] / "helpers/fake_stage.py"))
STEPS = 8


def training(root: Path, name: str, **values: Any) -> RehearsalStage:
    """A training of some steps, which gives and needs what is said in `gives` and `needs`."""
    record = f"runs/{name}/measured.json"
    own = {"record": str(root / record), "steps": STEPS, **values}
    needs, gives = own.pop("needs", ()), own.pop("gives", name)
    return RehearsalStage(
        name,
        "fit",
        values=own,
        needs=needs,
        gives={gives: str(root / "runs" / name)},
        begun=record,
        record=record,
        unit="step",
        steps=STEPS,
    )


def command(name: str, **values: Any) -> RehearsalStage:
    needs, gives = values.pop("needs", ()), values.pop("gives", {})
    return RehearsalStage(name, "score", values=values, needs=needs, gives=gives)


def rehearse(
    root: Path,
    *stages: RehearsalStage,
    chosen: list[str] | None = None,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    again: bool = False,
    stop: bool = True,
    limit: float = 60.0,
    speed: str | None = None,
    told: list[str] | None = None,
) -> dict[str, StageResult]:
    tell = (told if told is not None else []).append
    run = RehearsalRun(stages, {}, root, changes or {}, stop, limit, speed, lambda results: None, tell, program=PROGRAM)
    return run.run(chosen or [stage.name for stage in stages], again)


def alive(pid: str) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()
    except FileNotFoundError:
        return False


def test_a_training_is_stopped_with_all_it_started_and_goes_on_at_the_same_step(tmp_path: Path) -> None:
    child = tmp_path / "child"
    result = rehearse(tmp_path, training(tmp_path, "lfe", child=str(child)))["lfe"]
    before, after = result.records
    assert result.status == "done"
    assert result.stopped
    assert 0 < before["step"] < STEPS
    assert (after["began"], after["step"]) == (before["step"], STEPS)
    assert len(result.seconds) == 2
    pids = child.read_text().split()
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)


def test_each_stage_compiles_anew_and_a_resumed_one_finds_what_it_compiled(tmp_path: Path) -> None:
    told = tmp_path / "told"
    stages = [training(tmp_path, name, compile=str(told)) for name in ("lfe", "hfe")]
    results = rehearse(tmp_path, *stages)
    assert all(result.stopped for result in results.values())
    lines = [line.rsplit(" ", 1) for line in told.read_text().splitlines()]
    assert [there for _, there in lines] == ["False", "True"] * 2
    first, again, other, _ = (Path(place) for place, _ in lines)
    assert first == again != other
    assert not first.exists(), "nobody needs it any more"
    rehearse(tmp_path, stages[0], again=True, stop=False)
    assert told.read_text().splitlines()[-1].endswith("False")


def test_what_begins_again_after_a_stop_has_failed(tmp_path: Path) -> None:
    result = rehearse(tmp_path, training(tmp_path, "lfe", forget=True))["lfe"]
    assert result.status == "failed"
    assert f"stopped after step {result.records[0]['step']}, resumed at 0" in result.note


def test_what_ends_before_it_can_be_stopped_is_done(tmp_path: Path) -> None:
    stage = RehearsalStage("embed", "embed", values={}, begun="never")
    result = rehearse(tmp_path, stage)["embed"]
    assert (result.status, result.note) == ("done", "ended before it could be stopped")


def test_without_stops_each_is_run_once(tmp_path: Path) -> None:
    result = rehearse(tmp_path, training(tmp_path, "lfe"), stop=False)["lfe"]
    assert (result.status, result.stopped, len(result.seconds)) == ("done", False, 1)


def test_failures_stop_only_what_needs_their_result(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/no-disk").touch()  # a folder that cannot be written, whoever one is
    stages = [
        command("no-disk"),
        command("memory", say="OutOfMemoryError: CUDA out of memory", code=2, gives={"latents": "x"}),
        command("killed", kill=True),
        command("slow", files=str(tmp_path / "slow"), count=1000),
        command("lfe", needs=("latents",)),
        command("report"),
    ]
    told: list[str] = []
    results = rehearse(tmp_path, *stages, limit=1.0, told=told)
    assert [result.status for result in results.values()] == [*["failed"] * 4, "needs", "done"]
    assert "stages/no-disk" in results["no-disk"].lines[-1]
    assert results["memory"].code == 2
    assert results["memory"].lines == ["OutOfMemoryError: CUDA out of memory"]
    assert results["killed"].code == -signal.SIGKILL
    assert results["slow"].note == "ran longer than 1 s"
    assert results["lfe"].note == "needs memory"
    assert any("FAILED, exit status 2" in line and "CUDA out of memory" in line for line in told)


def test_the_same_call_runs_what_is_missing_and_keeps_the_rest(tmp_path: Path) -> None:
    there = tmp_path / "there"
    stages = [training(tmp_path, "vluer"), command("score", ask=str(there))]
    first = rehearse(tmp_path, *stages)
    assert [result.status for result in first.values()] == ["done", "failed"]
    there.touch()
    second = rehearse(tmp_path, *stages)
    assert second["vluer"] == first["vluer"]
    assert second["score"].status == "done"
    changed = rehearse(tmp_path, *stages, changes={"vluer": {"steps": STEPS - 1}})
    assert changed["vluer"].records[-1]["step"] == STEPS - 1, "other values are another run"
    log = tmp_path / "stages/score/log.txt"
    before = log.read_text().count("$ ")
    again = rehearse(tmp_path, *stages, chosen=["score"], again=True)
    assert again["score"].status == "done"
    assert log.read_text().count("$ ") == before + 1
    assert again["vluer"] == changed["vluer"]


def test_what_is_done_is_planned_again_for_another_speed_alone(tmp_path: Path) -> None:
    vluer, speed = training(tmp_path, "vluer"), tmp_path / "speed.jsonl"
    speed.write_text("slow")
    log = tmp_path / "stages/vluer/plan.txt"
    for content, plans in (("slow", 1), ("slow", 1), ("fast", 2), ("fast", 2)):
        speed.write_text(content)
        rehearse(tmp_path, vluer, stop=False, speed=str(speed))
        assert log.read_text().count("$ ") == plans, content
    rehearse(tmp_path, vluer, stop=False, speed="h200")
    assert plan_of(tmp_path, "vluer") == {"gpu": "h200"}
    assert (tmp_path / "stages/vluer/log.txt").read_text().count("$ ") == 1
    rehearse(tmp_path, vluer, stop=False, speed="h200", again=True)
    assert log.read_text().count("$ ") == 4, "what is run again is planned again: what it reads may be another"


def test_what_is_done_is_planned_again_by_as_many_as_there_are_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [training(tmp_path, f"stage-{number}", slow=0.3) for number in range(3)]
    rehearse(tmp_path, *stages, stop=False)
    monkeypatch.setattr("luve_lightning.ablations.rehearsal_run.cores", lambda: 1)
    rehearse(tmp_path, *stages, stop=False, speed="h200")
    ends = [(tmp_path / f"stages/{stage.name}/plan.json").stat().st_mtime for stage in stages]
    begins = [(tmp_path / f"stages/{stage.name}/planned-for.txt").stat().st_mtime for stage in stages]
    assert all(end <= begin for end, begin in zip(ends, begins[1:], strict=False))


def test_what_is_done_stays_where_its_plan_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages, told = [training(tmp_path, name) for name in ("vluer", "lfe")], list[str]()
    rehearse(tmp_path, stages[0], stop=False)

    def full(path: Path, text: str) -> None:
        if path.name == "planned-for.txt" and "vluer" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_text(path, text)

    monkeypatch.setattr("luve_lightning.ablations.rehearsal_run.write_text", full)
    results = rehearse(tmp_path, *stages, stop=False, speed="h200", told=told)
    assert [result.status for result in results.values()] == ["done", "done"]
    assert "vluer: no plan: [Errno 28] No space left on device" in told


def test_random_weights_stand_in_for_what_was_not_trained(tmp_path: Path) -> None:
    models = command("models", gives={"base": "random"})
    adaptation = training(tmp_path, "adaptation", gives="base")
    lfe = RehearsalStage("lfe", "fit", values={"base": "{base}"}, needs=("base",))
    run = RehearsalRun([models, adaptation, lfe], {}, tmp_path, {}, True, 9.0, None, lambda _: None, lambda _: None)
    assert run.wanted(["lfe"]) == {"models", "lfe"}
    assert run.wanted(["adaptation", "lfe"]) == {"adaptation", "lfe"}
    results = rehearse(tmp_path, models, adaptation, lfe)
    assert results["lfe"].status == "done"
    assert (tmp_path / "stages/lfe/overrides.yaml").read_text() == f"base: {tmp_path}/runs/adaptation\n"
    results = rehearse(tmp_path, models, adaptation, lfe, changes={"adaptation": {"kill": True}})
    assert results["adaptation"].status == "failed"
    assert (tmp_path / "stages/lfe/overrides.yaml").read_text() == "base: random\n"


def test_an_interrupted_rehearsal_stops_its_stage_and_goes_on_from_there(tmp_path: Path) -> None:
    record = tmp_path / "runs/lfe/measured.json"

    def interrupt() -> None:
        while not record.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    stages = [training(tmp_path, "lfe"), command("report")]
    sender = threading.Thread(target=interrupt)
    sender.start()
    with pytest.raises(SystemExit) as stopped:
        rehearse(tmp_path, *stages, stop=False)
    sender.join()
    assert stopped.value.code == 128 + signal.SIGTERM
    kept = StageResult.read(tmp_path / "stages/lfe/row.json")
    assert kept is not None
    assert (kept.status, kept.stopped) == ("interrupted", True)
    results = rehearse(tmp_path, *stages)
    assert [result.status for result in results.values()] == ["done", "done"]
    before, after = results["lfe"].records
    assert after["began"] == before["step"] > 0


def test_a_stage_that_a_killed_rehearsal_left_running_ends_before_its_files_are_cleared(tmp_path: Path) -> None:
    stage = training(tmp_path, "lfe")
    rehearse(tmp_path, stage)
    lock, told = try_lock(tmp_path / "stages/lfe/.lock"), list[str]()
    assert lock is not None
    made = tmp_path / "runs/lfe/measured.json"

    def let_go() -> None:
        while not told or "waiting for another process" not in told[-1]:
            time.sleep(0.01)
        there.append(made.exists())
        os.close(lock)

    there: list[bool] = []
    other = threading.Thread(target=let_go)
    other.start()
    changes = {"lfe": {"steps": STEPS - 1}}
    result = rehearse(tmp_path, stage, changes=changes, stop=False, told=told)["lfe"]
    other.join()
    assert there == [True], "it waits before it clears"
    assert (result.status, result.records[-1]["began"]) == ("done", 0)


def test_two_rehearsals_do_not_share_a_folder(tmp_path: Path) -> None:
    with only_rehearsal(tmp_path), pytest.raises(ValueError, match="another rehearsal is running in"):
        only_rehearsal(tmp_path).__enter__()
    with only_rehearsal(tmp_path):
        pass


def test_only_the_rehearsals_own_folder_is_cleared(tmp_path: Path) -> None:
    outside, inside = tmp_path / "data", tmp_path / "rehearsal/clips"
    for folder in (outside, inside):
        folder.mkdir(parents=True)
        (folder / "clip.mp4").touch()
    stage = command("index", gives={"index": str(outside), "clips": str(inside)}, say="one")
    root = tmp_path / "rehearsal"
    rehearse(root, stage)
    assert (inside / "clip.mp4").exists(), "a first run may find what a killed one left"
    rehearse(root, stage, again=True)
    assert (outside / "clip.mp4").exists()
    assert not inside.exists()


def test_what_two_stages_made_together_is_made_again_by_both(tmp_path: Path) -> None:
    store = tmp_path / "store"
    first, second = (
        command(name, gives={name: str(store)}, files=str(store), count=1) for name in ("pairs", "variants")
    )
    rehearse(tmp_path, first, second)
    (store / "old").touch()
    told: list[str] = []
    for chosen in ("pairs", "variants"):
        (store / "old").touch()
        results = rehearse(tmp_path, first, second, chosen=[chosen], again=True, told=told)
        assert not (store / "old").exists(), "what is there would be found, and nothing measured"
        assert [result.status for result in results.values()] == ["done", "done"]
    assert [line for line in told if "run again, too" in line] == [
        f"variants: run again, too: it shares {store}",
        f"pairs: run again, too: it shares {store}",
    ]
    changed = rehearse(tmp_path, replace(first, values={**first.values, "say": "other"}), second, chosen=["pairs"])
    assert changed["pairs"].status == "done"
    (store / "old").touch()
    broken = replace(second, values={"code": 2})
    results = rehearse(tmp_path, first, broken, again=True)
    assert not (store / "old").exists()
    assert (store / "0.txt").exists(), "the second one clears nothing of the first one's"
    assert [result.status for result in results.values()] == ["done", "failed"]


def test_a_table_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    def full(results: Mapping[str, StageResult]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "rehearsal.md")

    told: list[str] = []
    stages = [command("index"), command("report")]
    run = RehearsalRun(stages, {}, tmp_path, {}, True, 60.0, None, full, told.append, program=PROGRAM)
    assert [result.status for result in run.run(["index", "report"]).values()] == ["done", "done"]
    assert sum("the table cannot be written" in line for line in told) == 2
