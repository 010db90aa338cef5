"""One stage of a rehearsal: its command, run in a process group of its own, stopped once as SLURM does, and resumed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from luve_lightning.ablations.stage_process import GroupProcess
from luve_lightning.files import find_json, write_text
from luve_lightning.locks import try_lock

StageValues = Mapping[str, Any]
"""StageValues of a configuration by dotted key."""

PROGRAM = (sys.executable, "-m", "luve_lightning")
# `make_material` is no verb: nobody needs it for clips of one's own.
MAKE = (
    "import json, pathlib, sys; from luve_lightning.analysis.random_models import make_material as make; "
    "make(pathlib.Path(sys.argv[1]), **json.loads(sys.argv[2]))"
)
OVERRIDES = "overrides.yaml"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
_LAST = "last"
_POLL_SECONDS = 0.1
_KILL_AFTER = 60.0  # seconds in which a stage must end after SIGTERM when there is no time left
# What a program that SIGTERM ended leaves: a shell's number for it, Python's own for the signal.
_STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)


@dataclass(frozen=True)
class RehearsalStage:
    """One step of the recipe.

    Attributes:
        name: its row.
        verb: of the `luve` command; empty for the clips that are made.
        configs: the configuration files that the recipe has for it.
        values: what differs from them, by dotted key; may name what earlier stages made.
        needs: names of what must be there.
        without: for what it can do without, by name, the values where it is not there.
        gives: what it makes, paths by name.
        begun: pattern of files under the rehearsal's folder. When `least` of them are there, it has begun and can be
            stopped; empty for what is not stopped.
        least: see `begun`.
        record: file that says what it took, relative to the folder; empty when there is none.
        bulky: folders that are removed when it is done.
        unit: what it repeats: "step", "clip", "caption", "video".
        units: how many of them the whole recipe has; None when it is done once.
        steps: optimiser steps of a training.
        gpus: how many GPUs work on one unit; torchrun starts a process for each where it is a video.
        note: said in its row.
    """

    name: str
    verb: str
    configs: tuple[Path, ...] = ()
    values: StageValues = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    without: Mapping[str, StageValues] = field(default_factory=dict)
    gives: Mapping[str, str] = field(default_factory=dict)
    begun: str = ""
    least: int = 1
    record: str = ""
    bulky: tuple[str, ...] = ()
    unit: str = ""
    units: int | None = None
    steps: int = 0
    gpus: int = 1
    note: str = ""

    def tree(self, there: Mapping[str, str]) -> dict[str, Any]:
        """Its values as a configuration, with the paths of what is there."""
        values = dict(self.values)
        for name, other in self.without.items():
            if name not in there:
                values = {key: value for key, value in values.items() if f"{{{name}}}" not in str(value)} | dict(other)
        return nested({key: _filled(value, there) for key, value in values.items()})


def _filled(value: Any, there: Mapping[str, str]) -> Any:
    """A value with the paths of what it names."""
    if isinstance(value, list):
        return [_filled(one, there) for one in value]
    if isinstance(value, str):
        for name, path in there.items():
            value = value.replace(f"{{{name}}}", path)
    return value


def nested(values: StageValues) -> dict[str, Any]:
    """A configuration of values by dotted key."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parts, last = key.split(".")
        node = tree
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def laid_over(tree: Any, other: Any) -> Any:
    """A configuration with another's values in place of its own."""
    if not isinstance(tree, Mapping) or not isinstance(other, Mapping):
        return other
    return {**tree, **{key: laid_over(tree[key], value) if key in tree else value for key, value in other.items()}}


@dataclass
class StageResult:
    """What came of a stage, as it is kept in `stages/NAME/row.json`.

    Attributes:
        name: of the stage.
        command: as typed.
        status: "done", "failed", "interrupted" by whoever ended the rehearsal, "needs" with the stages that it needs
            and that are not done.
        digest: of what it was run with.
        seconds: of each of its processes, the stopped one first.
        records: what each of them says that it took; the stopped one may say nothing.
        stopped: whether one was stopped.
        code: exit status of a failure.
        lines: last lines of its log then.
        note: what else there is to say.
        finished: UTC, ISO 8601.
        bytes: size of what it left.
    """

    name: str
    command: str = ""
    status: str = ""
    digest: str = ""
    seconds: list[float] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False
    code: int | None = None
    lines: list[str] = field(default_factory=list)
    note: str = ""
    finished: str = ""
    bytes: int | None = None

    @classmethod
    def read(cls, path: Path) -> StageResult | None:
        """The kept one, if there is one."""
        found = find_json(path)
        try:
            return cls(**found) if found else None
        except TypeError:  # of another version
            return None


class StageRun:
    """Runs one stage to its end.

    Args:
        stage: what to run.
        root: the rehearsal's folder.
        tree: its values, with the paths of what is there.
        stop: whether to stop it once.
        limit: seconds for all of it.
        program: words before the verb.
        tell: called with lines for people.
    """

    def __init__(
        self,
        stage: RehearsalStage,
        root: Path,
        tree: Mapping[str, Any],
        stop: bool,
        limit: float,
        program: Sequence[str] = PROGRAM,
        tell: Callable[[str], None] = print,
    ) -> None:
        self.stage, self.root, self.tree, self.stop, self.limit = stage, root, tree, stop, limit
        self.folder = root / "stages" / stage.name
        self.program, self.tell = program, tell
        self.compiled = self.folder / "compiled"
        self.record = root / stage.record if stage.record else None
        self._process: GroupProcess | None = None

    def words(self) -> list[str]:
        """The command."""
        stage = self.stage
        if not stage.verb:
            given = dict(self.tree)
            return [sys.executable, "-c", MAKE, str(given.pop("folder")), json.dumps(given)]
        words = [*self._launched(), stage.verb, *self.configs()]
        if stage.verb == "fit":
            words += ["--ckpt_path", _LAST]  # begins where there is none
        elif self.record is not None:
            words += ["--measured", str(self.record)]
        return words

    def _launched(self) -> list[str]:
        """The words before the verb."""
        # A Trainer starts its processes itself.
        if not self.program or self.stage.verb != "generate" or self.stage.gpus == 1:
            return list(self.program)
        python, *module = self.program
        return [python, *TORCHRUN, "--nproc-per-node", str(self.stage.gpus), *module]

    def configs(self) -> list[str]:
        """The configuration files of its command."""
        files = [*self.stage.configs, self.folder / OVERRIDES]
        return [word for file in files for word in ("--config", str(file))]

    def write_overrides(self) -> None:
        """Write the configuration file of its values, which its command and its plan read."""
        write_text(self.folder / OVERRIDES, yaml.safe_dump(dict(self.tree), sort_keys=False, allow_unicode=True))

    def run(self, result: StageResult, begin: Callable[[], None]) -> None:
        """Run it, to be stopped unless `result` says that it was; fills `result` in.

        Args:
            result: what came of it, or of an interrupted run that this one goes on with.
            begin: called before it starts, when no earlier run that was left behind writes in its folders any more.

        Raises:
            KeyboardInterrupt: or SystemExit, what a signal to this process raises; the stage was stopped then.
        """
        deadline = time.monotonic() + self.limit
        lock = self._lock()
        if lock is None:
            result.status, result.note = "failed", "another process is still running it"
            return
        try:
            begin()
            if self.stop and self.stage.begun and not result.stopped and not self._stopped(result, lock, deadline):
                return
            self._finish(result, lock, deadline)
        except BaseException:
            if self._process is not None and self._process.code() is None:
                code = self._process.end(_KILL_AFTER)
                result.status = "interrupted"
                self._note(result, self._process, stopped=code in _STOPPED and self._begun() > 0)
            raise
        finally:
            os.close(lock)

    def _lock(self) -> int | None:
        """The lock on the folder, which a run holds that was left behind; it may take so long as a stage may."""
        self.folder.mkdir(parents=True, exist_ok=True)
        deadline, told = time.monotonic() + self.limit, False
        while (lock := try_lock(self.folder / ".lock")) is None and time.monotonic() < deadline:
            if not told:
                self.tell(f"{self.stage.name}: waiting for another process that still runs it")
            told = True
            time.sleep(_POLL_SECONDS)
        return lock

    def _start(self, lock: int) -> GroupProcess:
        if self.record is not None:
            self.record.unlink(missing_ok=True)
        # What an earlier stage compiled would hide what a first use takes, which the plan counts.
        caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        own = {name: str(self.compiled.resolve() / place) for name, place in caches.items()}
        self._process = GroupProcess(self.words(), self.folder / "log.txt", own, hold=lock)
        return self._process

    def _begun(self) -> int:
        return sum(1 for _ in self.root.glob(self.stage.begun)) if self.stage.begun else 0

    def _stopped(self, result: StageResult, lock: int, deadline: float) -> bool:
        """Start it and stop it once it has begun; returns whether it is to be resumed."""
        process = self._start(lock)
        least = max(self.stage.least, self._begun() + 1)  # a failed run may have left something
        came = process.wait(deadline - time.monotonic(), lambda: self._begun() >= least)
        if not came:
            self._late(result, process)
            return False
        code = process.code()
        if code is None:
            process.signal(signal.SIGTERM)
            if not process.wait(deadline - time.monotonic()):
                self._late(result, process, "did not end after SIGTERM")
                return False
            code = process.code()
            assert code is not None
        self._note(result, process, stopped=code in _STOPPED)
        if code == 0:
            result.note = _joined(result.note, "ended before it could be stopped")
            result.status = "done"
            return False
        if code not in _STOPPED:
            self._fail(result, process, code)
            return False
        return True

    def _finish(self, result: StageResult, lock: int, deadline: float) -> None:
        process = self._start(lock)
        if not process.wait(deadline - time.monotonic()):
            self._late(result, process)
            return
        code = process.code()
        assert code is not None
        self._note(result, process, stopped=False)
        if code:
            self._fail(result, process, code)
            return
        wrong = self._not_resumed(result) if result.stopped else ""
        result.status = "failed" if wrong else "done"
        result.note = _joined(result.note, wrong)

    def _note(self, result: StageResult, process: GroupProcess, stopped: bool) -> None:
        result.seconds.append(round(process.seconds, 1))
        process.clear()
        found = find_json(self.record) if self.record is not None else {}
        result.records.append(found)
        result.stopped |= stopped

    def _late(self, result: StageResult, process: GroupProcess, why: str = "") -> None:
        process.end(_KILL_AFTER)
        self._note(result, process, stopped=False)
        self._fail(result, process, None)
        result.note = _joined(result.note, why or f"ran longer than {self.limit:g} s")

    def _fail(self, result: StageResult, process: GroupProcess, code: int | None) -> None:
        result.status, result.code, result.lines = "failed", code, process.tail()

    def _not_resumed(self, result: StageResult) -> str:
        """Why it did not go on where it was stopped; empty when it did."""
        *earlier, after = result.records
        before: dict[str, Any] = next((record for record in reversed(earlier) if record), {})
        if self.stage.verb == "fit" and before:
            if after.get("began") != before.get("step") or after.get("step") != self.stage.steps:
                return (
                    f"stopped after step {before.get('step')}, resumed at {after.get('began')}, ended at "
                    f"{after.get('step')} of {self.stage.steps}"
                )
        elif "total" in after and (not after["there"] or after["there"] + after["made"] != after["total"]):
            return f"resumed with {after['there']} of {after['total']} there and made {after['made']}"
        return ""


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)
