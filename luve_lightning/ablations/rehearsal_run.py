"""A rehearsal's stages one after another, each with its plan, as far as they can be run; what is done is kept."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from luve_lightning.ablations.rehearsal_stage import PROGRAM, RehearsalStage, StageResult, StageRun, laid_over
from luve_lightning.ablations.stage_process import GroupProcess, raising_signals
from luve_lightning.files import find_json, text_digest, write_text
from luve_lightning.locks import try_lock
from luve_lightning.machine import cores

ROW, PLAN = "row.json", "plan.json"
_PLANNED_FOR = "planned-for.txt"  # which command on which GPU's speed the plan is of
_PLANNED = ("precompute", "embed", "score", "fit", "generate", "upsample")
_FROM_SCRATCH = ("random-models", "bench")  # verbs that do not go on with what is there
_PLAN_SECONDS = 240.0  # that a plan may take when its stage is done
_NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # a plan needs none, and would take memory of the stage beside it
Tell = Callable[[str], None]


@contextmanager
def only_rehearsal(root: Path) -> Iterator[None]:
    """Keep other rehearsals out of a folder.

    Raises:
        ValueError: one is at work there.
    """
    root.mkdir(parents=True, exist_ok=True)
    if (lock := try_lock(root / ".lock")) is None:
        raise ValueError(f"output: another rehearsal is running in {root}; expected another folder, or to wait for it")
    try:
        yield
    finally:
        os.close(lock)


class RehearsalRun:
    """Runs stages.

    Args:
        stages: all of the recipe, in order.
        given: what is there before, paths by name.
        root: the rehearsal's folder.
        changes: more values of stages by their name, laid over their own.
        stop: whether each is stopped once and resumed.
        limit: seconds for each.
        speed: the GPU's speed, a file of `luve bench --subject speed` or a known GPU's name; None for no plans, unless
            a stage makes one.
        updated: called with the results so far, whenever there is a new one.
        tell: called with lines for people.
        program: words before a verb.
    """

    def __init__(
        self,
        stages: Sequence[RehearsalStage],
        given: Mapping[str, str],
        root: Path,
        changes: Mapping[str, Mapping[str, Any]],
        stop: bool,
        limit: float,
        speed: str | None,
        updated: Callable[[Mapping[str, StageResult]], None],
        tell: Tell,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        self.stages, self.given, self.root, self.changes = stages, given, root, changes
        self.stop, self.limit, self.speed, self.program = stop, limit, speed, program
        self.updated, self.tell = updated, tell
        self.results: dict[str, StageResult] = {}
        self._again: Collection[str] = ()
        self._plans: dict[str, GroupProcess] = {}

    def run(self, chosen: Collection[str], again: bool = False) -> dict[str, StageResult]:
        """Run the chosen stages and what they need that is missing; earlier results stand in for the others.

        Args:
            chosen: names of stages.
            again: whether finished ones among the chosen are run again, and with them those that made the same.

        Returns:
            The results by name, in the order of the recipe.

        Raises:
            KeyboardInterrupt: or SystemExit, at a signal; the running stage was stopped then, and the same call
                goes on with it.
        """
        wanted = self.wanted(chosen)
        self._again = self._sharing(chosen) if again else ()
        wanted |= set(self._again)
        there = dict(self.given)
        with raising_signals():
            try:
                for stage in self.stages:
                    kept = StageResult.read(self._file(stage, ROW))
                    if stage.name not in wanted:
                        if kept is not None:
                            self.results[stage.name] = kept
                        if kept is not None and kept.status == "done":
                            there |= stage.gives
                        continue
                    result = self._one(stage, there, kept, stage.name in self._again)
                    self.results[stage.name] = result
                    if result.status == "done":
                        there |= stage.gives
                    self._update()
                self._await_plans()
            finally:
                for plan in self._plans.values():
                    plan.end(1.0)
        return self.results

    def _sharing(self, chosen: Collection[str]) -> set[str]:
        """The chosen stages, and those that have filled the same store as one: cleared, it lacks what was theirs."""
        found = set(chosen)
        places = {path for one in self.stages if one.name in found for path in _made(self.root, one)}
        for one in self.stages:
            if one.name not in found and self._has_run(one) and places & set(_made(self.root, one)):
                self.tell(f"{one.name}: run again, too: it shares {', '.join(sorted(one.gives.values()))}")
                found.add(one.name)
        return found

    def wanted(self, chosen: Collection[str]) -> set[str]:
        """Names of the chosen stages and of those that have to be run for them."""
        found = set(chosen)
        done = {stage.name for stage in self.stages if self._is_done(stage)}
        for stage in reversed(self.stages):
            if stage.name not in found:
                continue
            earlier = self.stages[: self.stages.index(stage)]
            for need in stage.needs:
                makers = [one.name for one in earlier if need in one.gives]
                if makers and need not in self.given and not set(makers) & (found | done):
                    found.add(makers[0])  # random weights, where there are some, before a training
        return found

    def _one(
        self, stage: RehearsalStage, there: Mapping[str, str], kept: StageResult | None, again: bool
    ) -> StageResult:
        """Run one stage, unless it was done in the same way."""
        missing = [need for need in stage.needs if need not in there]
        if missing:
            makers = [one.name for one in self.stages if set(one.gives) & set(missing)]
            result = StageResult(stage.name, status="needs", note=f"needs {', '.join(makers)}")
            return self._keep(stage, result)
        tree = laid_over(stage.tree(there), self.changes.get(stage.name, {}))
        run = StageRun(stage, self.root, tree, self.stop, self.limit, self.program, self.tell)
        digest = text_digest(json.dumps([run.words(), tree], sort_keys=True))
        if kept is not None and kept.status == "done" and kept.digest == digest and not again:
            self.tell(f"{stage.name}: done already, {sum(kept.seconds):.0f} s")
            try:
                self._plan(stage, run, there, done=True)
            except OSError as error:  # a plan is no reason not to go on
                self.tell(f"{stage.name}: no plan: {error}")
            return kept
        same = kept is not None and kept.digest == digest and not again
        goes_on = same and kept is not None and kept.status == "interrupted"
        fresh = (kept is not None and not same) or stage.verb in _FROM_SCRATCH
        result = kept if goes_on and kept is not None else StageResult(stage.name, digest=digest, note=stage.note)
        result.command = _typed(run.words(), self.program)
        self.tell(f"{stage.name}: {result.command}")
        result.status = ""

        def begin() -> None:
            if fresh:
                self._clear(stage)
            if not goes_on:
                shutil.rmtree(run.compiled, ignore_errors=True)
            result.status = "interrupted"  # as long as nothing else is known: this process may be killed
            self._keep(stage, result)

        try:
            run.write_overrides()
            self._plan(stage, run, there)
            run.run(result, begin)
        except OSError as error:  # its own folder cannot be written
            result.status, result.lines = "failed", [f"{type(error).__name__}: {error}"]
        except BaseException:
            if result.status:  # it has begun
                self.results[stage.name] = self._keep(stage, result)
                self._update()
            raise
        if result.status == "done":
            result.bytes = _size(self.root, stage)
            for folder in (*(self.root / bulky for bulky in stage.bulky), run.compiled):
                shutil.rmtree(folder, ignore_errors=True)
        self._say(result)
        return self._keep(stage, result)

    def _update(self) -> None:
        try:
            self.updated(self.results)
        except OSError as error:
            self.tell(f"the table cannot be written: {error}")

    def _say(self, result: StageResult) -> None:
        took = f"{sum(result.seconds):.0f} s" + f"; {result.note}" * bool(result.note)
        if result.status == "done":
            self.tell(f"{result.name}: done in {took}")
        else:
            how = "" if result.code is None else f", exit status {result.code}"
            self.tell("\n".join([f"{result.name}: FAILED{how} after {took}", *(f"    {x}" for x in result.lines)]))

    def _keep(self, stage: RehearsalStage, result: StageResult) -> StageResult:
        result.finished = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            write_text(self._file(stage, ROW), json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            self.tell(f"{stage.name}: its result cannot be kept: {error}")
        return result

    def _file(self, stage: RehearsalStage, name: str) -> Path:
        return self.root / "stages" / stage.name / name

    def _has_run(self, stage: RehearsalStage) -> bool:
        return StageResult.read(self._file(stage, ROW)) is not None

    def _is_done(self, stage: RehearsalStage) -> bool:
        kept = StageResult.read(self._file(stage, ROW))
        return kept is not None and kept.status == "done"

    def _clear(self, stage: RehearsalStage) -> None:
        """Remove what an earlier run of it made, inside the rehearsal's folder, but what a stage that stays made."""
        later = [one for one in self.stages[self.stages.index(stage) + 1 :] if one.name in self._again]
        stays = [one for one in self.stages if one not in (stage, *later) and self._has_run(one)]
        others = {path for one in stays for path in _made(self.root, one)}
        gone = set(_made(self.root, stage)) - others
        for one in later:
            if gone & set(_made(self.root, one)):  # it is run again, even if this rehearsal does not come so far
                self._file(one, ROW).unlink(missing_ok=True)
        for path in _made(self.root, stage):
            inside = path.resolve() != self.root.resolve() and path.resolve().is_relative_to(self.root.resolve())
            if inside and path not in others:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)

    # Plans

    def _plan(self, stage: RehearsalStage, run: StageRun, there: Mapping[str, str], done: bool = False) -> None:
        """Begin to plan a stage, beside it: a plan takes a core and no GPU.

        One that is done keeps its plan for the same speed, or waits for a core: a dozen plans would begin at once.
        """
        speed = self.speed or there.get("speed")
        if speed is None or stage.verb not in _PLANNED:
            return
        target, planned_for = self._file(stage, PLAN), self._file(stage, _PLANNED_FOR)
        gpu = [] if stage.verb == "score" else ["--gpu", speed]  # whose plan knows of no GPU
        words = [*self.program, "plan", *run.configs(), *gpu, "--output", str(target)]
        measured = Path(speed).read_text("utf-8") if gpu and Path(speed).is_file() else ""
        key = text_digest(json.dumps([words, run.tree, measured], sort_keys=True))
        if done and find_json(target) and planned_for.is_file() and planned_for.read_text("utf-8") == key:
            return
        target.unlink(missing_ok=True)
        running = [plan for plan in self._plans.values() if plan.code() is None]
        if done and len(running) >= cores():
            running[0].wait(_PLAN_SECONDS)
        write_text(planned_for, key)
        self._plans[stage.name] = GroupProcess(words, target.with_suffix(".txt"), _NO_GPU)

    def _await_plans(self) -> None:
        """Wait for the plans that are still being made."""
        if any(plan.code() is None for plan in self._plans.values()):
            self.tell("waiting for plans")
        for name, plan in self._plans.items():
            if plan.wait(_PLAN_SECONDS) and plan.code() == 0:
                continue
            lines = plan.tail()
            self.tell(f"{name}: no plan: {lines[-1] if lines else 'it took too long'}")
        if self._plans:
            self._update()


def plan_of(root: Path, name: str) -> dict[str, Any]:
    """The plan of a stage; empty when there is none."""
    return find_json(root / "stages" / name / PLAN)


def _typed(words: Sequence[str], program: Sequence[str]) -> str:
    """The command as a user types it."""
    if list(words[: len(program)]) != list(program):
        return shlex.join(["python", *words[1:]])
    return shlex.join(["luve", *words[len(program) :]])


def _made(root: Path, stage: RehearsalStage) -> list[Path]:
    """What a stage makes."""
    return [root / "runs" / stage.name] if stage.verb == "fit" else [Path(path) for path in stage.gives.values()]


def _size(root: Path, stage: RehearsalStage) -> int:
    """Bytes of what a stage made."""
    paths = _made(root, stage)
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    return sum(file.stat().st_size for file in files)
