"""Runs the stages of tables on this machine, several at a time: table by table, what most waits for first."""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from luve_lightning.ablations.graph import AblationStage, Plan, Use
from luve_lightning.ablations.stage_process import (
    Failure,
    StageProcess,
    done_record,
    is_whole,
    lock_folder,
    missing_stages,
    raising_signals,
)

_POLL_SECONDS = 0.1
_LOCK_SECONDS = 1.0
_STEPS = "--trainer.max_steps"
_GRACE_SECONDS = 20.0  # time for training to save its last checkpoint


@dataclass(frozen=True)
class Standing:
    """How far a run is.

    Attributes:
        done: number of finished stages.
        total: number of all stages.
        running: names of the running stages, with their number.
        seconds_left: an estimate; None while nothing is known.
    """

    done: int
    total: int
    running: Mapping[str, int]
    seconds_left: float | None


class AblationWatcher(Protocol):
    """Receives news of a run."""

    def standing(self, standing: Standing) -> None:
        """Called now and then."""

    def finished(self, stage: AblationStage, seconds: float, standing: Standing) -> None:
        """Called when a stage is done."""

    def failed(self, failure: Failure) -> None:
        """Called when a stage has failed."""


@dataclass(frozen=True)
class Slots:
    """Places where stages run at the same time.

    Attributes:
        count: how many.
        gpus: names for CUDA_VISIBLE_DEVICES, used in turn; one or none leaves it unchanged.
        cores: the machine's cores, shared by the slots.
    """

    count: int
    gpus: tuple[str, ...] = ()
    cores: int = 1

    def environment(self, slot: int) -> dict[str, str]:
        """The environment variables of a slot's process."""
        variables = {"OMP_NUM_THREADS": str(max(1, self.cores // self.count))}
        if len(self.gpus) > 1:
            variables["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        return variables

    def free(self, taken: Collection[int]) -> int | None:
        """A free slot, of the GPU on which least runs; None where all are taken."""
        places = max(1, len(self.gpus))
        busy = Counter(slot % places for slot in taken)
        free = (slot for slot in range(self.count) if slot not in taken)
        return min(free, key=lambda slot: (busy[slot % places], slot), default=None)


@dataclass
class Outcome:
    """The failed stages of a run, and the rows and seeds left without numbers, with the failure."""

    failures: list[Failure] = field(default_factory=list)
    lost: dict[Use, Failure] = field(default_factory=dict)


class LocalRunner:
    """Runs stages, each as soon as those that it needs are done.

    Args:
        make_plan: makes the plan without the rows and seeds that have failed.
        program: words before the command's own.
        facts: recorded with every finished stage.
    """

    def __init__(
        self,
        make_plan: Callable[[Collection[Use]], Plan],
        slots: Slots,
        program: Sequence[str],
        facts: Mapping[str, Any],
        watcher: AblationWatcher,
    ) -> None:
        self.make_plan, self.slots, self.program = make_plan, slots, program
        self.facts, self.watcher = facts, watcher
        self.outcome = Outcome()
        self._running: dict[int, StageProcess] = {}
        self._done: set[str] = set()
        self._failed: set[str] = set()
        self._locked_until: dict[str, float] = {}
        self._seconds: dict[str, list[float]] = {}

    def run(self) -> Outcome:
        """Run everything that is missing, except what depends on a failed stage.

        Raises:
            KeyboardInterrupt: at SIGINT, after the running stages were stopped.
            SystemExit: likewise at SIGTERM and SIGHUP, with 128 plus the signal's number.
        """
        plan = self.make_plan(())
        self._look(plan)
        with raising_signals():
            try:
                while True:
                    if self._collect():
                        plan = self.make_plan(self.outcome.lost)
                        self._look(plan)
                    waiting = self._launch(plan)
                    if not self._running and not waiting:
                        return self.outcome
                    self.watcher.standing(self._standing(plan))
                    time.sleep(_POLL_SECONDS)
            finally:
                self._stop()

    def _look(self, plan: Plan) -> None:
        """Find what need not be run, and how long finished stages took."""
        missing = missing_stages(plan)
        self._done -= missing  # without a row that failed, an evaluation is another one and uses videos again
        for digest, stage in plan.stages.items():
            if digest in self._done or digest in self._failed:
                continue
            if digest not in missing:
                self._done.add(digest)
            if isinstance(seconds := (done_record(stage) or {}).get("seconds"), int | float):
                self._seconds.setdefault(_kind(stage), []).append(float(seconds))

    def _launch(self, plan: Plan) -> bool:
        """Fill the free slots; returns whether another process is still running a stage that is needed."""
        settled = self._done | self._failed | {process.stage.digest for process in self._running.values()}
        waiting = False
        for digest, stage in self._in_order(plan):
            if digest in settled or not self._done.issuperset(stage.needs):
                continue
            free = self.slots.free(self._running)
            if self._locked_until.get(digest, 0.0) > time.monotonic():
                waiting = True
                continue
            if free is None:
                break
            if (lock := lock_folder(stage)) is None:
                self._locked_until[digest] = time.monotonic() + _LOCK_SECONDS
                waiting = True
            elif is_whole(stage):  # another process finished it meanwhile
                os.close(lock)
                self._done.add(digest)
                waiting = True
            else:
                environment = self.slots.environment(free)
                self._running[free] = StageProcess(stage, lock, self.program, environment, self.facts)
        self._plan = plan
        return waiting

    def _in_order(self, plan: Plan) -> list[tuple[str, AblationStage]]:
        """Table by table: first what begins the longest way to the end, then what most rows and seeds wait for.

        A later table has the slots that an earlier one leaves free: if all went on together, a run that is stopped
        would have trained for every table and finished none. With many slots, a long stage that begins last is waited
        for alone. What is not known yet counts as long as the longest: it is soon known.
        """
        usual = self._usual()
        unknown = max(usual.values(), default=1.0)
        after: dict[str, float] = {}
        way: dict[str, float] = {}
        for digest, stage in reversed(list(plan.stages.items())):
            way[digest] = usual.get(_kind(stage), unknown) + after.get(digest, 0.0)
            for need in stage.needs:
                after[need] = max(after.get(need, 0.0), way[digest])
        return sorted(plan.stages.items(), key=lambda item: (item[1].place, -way[item[0]], -len(item[1].uses)))

    def _usual(self) -> dict[str, float]:
        """The mean seconds of each kind of stage that is known."""
        return {kind: statistics.fmean(values) for kind, values in self._seconds.items()}

    def _collect(self) -> bool:
        """Take in what has ended; returns whether something failed."""
        failed = False
        for slot, process in list(self._running.items()):
            if not process.poll():
                continue
            del self._running[slot]
            failure, stage = process.finish(), process.stage
            if failure is None:
                self._done.add(stage.digest)
                self._seconds.setdefault(_kind(stage), []).append(process.seconds)
                self.watcher.finished(stage, process.seconds, self._standing(self._plan))
                continue
            failed = True
            self._failed.add(stage.digest)
            self.outcome.failures.append(failure)
            goals = self._plan.goals.items()
            # A row whose numbers are known keeps them when what they were read from cannot be made again.
            waiting = {(row, seed) for (row, seed, _), digest in goals if digest not in self._done}
            for use in stage.uses & waiting:
                self.outcome.lost.setdefault(use, failure)
            self.watcher.failed(failure)
        return failed

    def _standing(self, plan: Plan) -> Standing:
        done = sum(digest in self._done for digest in plan.stages)
        running = Counter(process.stage.name for process in self._running.values())
        return Standing(done, len(plan.stages), running, self._seconds_left(plan))

    def _seconds_left(self, plan: Plan) -> float | None:
        if not self._seconds:
            return None
        usual = self._usual()
        any_stage = statistics.fmean(itertools.chain(*self._seconds.values()))
        missing = [stage for digest, stage in plan.stages.items() if digest not in self._done]
        left = sum(usual.get(_kind(stage), any_stage) for stage in missing)
        left -= sum(min(p.seconds, usual.get(_kind(p.stage), any_stage)) for p in self._running.values())
        return max(0.0, left) / self.slots.count

    def _stop(self) -> None:
        """End the running stages: they are unfinished, and the next run starts them again."""
        for process in self._running.values():
            process.signal(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        try:
            while time.monotonic() < deadline and not all(p.poll() for p in self._running.values()):
                time.sleep(_POLL_SECONDS)
        finally:  # also at a second Ctrl-C
            for process in self._running.values():
                if not process.poll():
                    process.signal(signal.SIGKILL)
                    process.process.wait()
                os.close(process.lock)
            self._running.clear()


def _kind(stage: AblationStage) -> str:
    """What takes about as long: stages of one name that train for as many steps."""
    steps = dict(itertools.pairwise(stage.words)).get(_STEPS, "")
    return f"{stage.name} {steps}"
