"""The folder of a stage's result: whether it is finished, and which process is working in it; groups of processes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from luve_lightning.ablations.graph import AblationStage, Plan
from luve_lightning.files import find_json, write_text
from luve_lightning.locks import try_lock

_DONE = "done.json"
_LOCK = ".lock"
_LOG = "log.txt"
_RECORD = ".json"  # of a file beside the record: numbers, of an evaluation or of a video
_CHECKPOINTS = "checkpoints"  # with which a training goes on; no other stage reads them
_GROWING = ".jsonl"  # of a list to which whoever reads the folder may add
_TAIL = 5
_POLL_SECONDS = 0.5
_SOON_SECONDS = 0.1
_GROUP_TAIL = 8
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LEFTOVERS_SECONDS = 3.0  # in which what a process started must end after it


def done_record(stage: AblationStage) -> dict[str, Any] | None:
    """What was recorded when a stage was finished, or None; None, too, where numbers that it made are gone."""
    record = _written(stage)
    numbers = (name for name in record.get("files", ()) if name.endswith(_RECORD) and "/" not in name)
    return record if record and all((stage.folder / name).is_file() for name in numbers) else None


def is_done(stage: AblationStage) -> bool:
    """Whether a stage was finished and its numbers can be read; weights and videos may be gone."""
    return done_record(stage) is not None


def is_whole(stage: AblationStage) -> bool:
    """Whether a stage was finished and all that it made is there, for other stages to use."""
    record = done_record(stage)
    if record is None or record.get("begun_again"):
        return False
    return all(_size(stage.folder / name) == size for name, size in record.get("files", {}).items())


def missing_stages(plan: Plan) -> set[str]:
    """Digests of what is to be run: the unfinished stages, and whatever these use that is not there any more."""
    found: set[str] = set()
    used: set[str] = set()
    for digest, stage in reversed(list(plan.stages.items())):
        if not (is_whole(stage) if digest in used else is_done(stage)):
            found.add(digest)
            used.update(stage.needs)
    return found


def write_done(stage: AblationStage, facts: Mapping[str, Any]) -> None:
    """Record that a stage is finished, and what it made; written last, and atomically."""
    _write(stage, {"stage": stage.name, "hash": stage.digest, **facts, "files": _made(stage.folder)})


def _made(folder: Path) -> dict[str, int]:
    """Sizes of what a stage has made, by path."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        inside = path.relative_to(folder)
        own = path.name.startswith(".") or inside.as_posix() in (_DONE, _LOG)
        if not (own or path.suffix == _GROWING or inside.parts[0] == _CHECKPOINTS):
            found[inside.as_posix()] = path.stat().st_size
    return found


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _written(stage: AblationStage) -> dict[str, Any]:
    """The record in a stage's folder; empty where there is none of this stage."""
    record = find_json(stage.folder / _DONE)
    return record if record.get("hash") == stage.digest else {}


def _write(stage: AblationStage, record: Mapping[str, Any]) -> None:
    write_text(stage.folder / _DONE, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _begin_again(stage: AblationStage) -> None:
    """Note that a finished stage is made again.

    Its numbers stay, but half a result may have files as large as the whole one's.
    """
    if record := _written(stage):
        _write(stage, record | {"begun_again": True})


def lock_folder(stage: AblationStage) -> int | None:
    """Lock a folder, so that no two processes work in it.

    Returns:
        A descriptor that holds the lock until it is closed, here and in every process that inherited it: a run
        that outlives a killed `luve ablate` keeps others out. None when another process holds it.
    """
    stage.folder.mkdir(parents=True, exist_ok=True)
    return try_lock(stage.folder / _LOCK)


def log_path(stage: AblationStage) -> Path:
    """The file for a stage's output."""
    return stage.folder / _LOG


@dataclass(frozen=True)
class Failure:
    """A failed stage.

    Attributes:
        code: exit status; negative for a signal.
        tail: last lines that it printed.
    """

    stage: AblationStage
    code: int
    tail: tuple[str, ...]

    @property
    def reason(self) -> str:
        """The failure in one line."""
        said = f": {self.tail[-1]}" if self.tail else ""
        return f"{self.stage.name} ended with exit status {self.code}{said}"


class StageProcess:
    """Runs a stage's command in a session of its own, its output in the stage's log.

    Args:
        lock: lock on its folder, see `lock_folder`; closed when the process has ended.
        program: words before the command's own.
        environment: variables that differ from this process's.
        facts: recorded with the result when it is finished.
    """

    def __init__(
        self,
        stage: AblationStage,
        lock: int,
        program: Sequence[str],
        environment: Mapping[str, str],
        facts: Mapping[str, Any],
    ) -> None:
        self.stage, self.lock, self.facts = stage, lock, dict(facts)
        _begin_again(stage)
        self.words = [*program, *stage.words]
        if stage.words[0] == "fit" and (stage.folder / "checkpoints" / "last.ckpt").is_file():
            self.words += ["--ckpt_path", "last"]  # interrupted training continues
        self.started = time.monotonic()
        with log_path(stage).open("ab") as log:
            log.write(f"$ {shlex.join(self.words)}\n".encode())
            log.flush()
            self._log_from = log.tell()
            # In a session of its own: Ctrl-C is ours to pass on. With the lock: see lock_folder.
            self.process = subprocess.Popen(
                self.words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                pass_fds=(lock,),
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self.started

    def poll(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    def finish(self) -> Failure | None:
        """Once it has ended: record that it is done, or return the failure."""
        code = self.process.wait()
        try:
            if code == 0:
                now = datetime.now(UTC).isoformat(timespec="seconds")
                seconds, command = round(self.seconds, 1), shlex.join(self.words)
                facts = {"seconds": seconds, "command": command, "finished": now} | self.facts
                write_done(self.stage, facts)
                return None
            return Failure(self.stage, code, self._tail())
        finally:
            os.close(self.lock)

    def signal(self, number: int) -> None:
        """Send a signal to it and to everything it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _tail(self) -> tuple[str, ...]:
        with log_path(self.stage).open("rb") as log:
            log.seek(self._log_from)
            lines = log.read().decode(errors="replace").replace("\r", "\n").splitlines()
        return tuple(line.rstrip() for line in lines if line.strip())[-_TAIL:]


def run_stage(
    stage: AblationStage, program: Sequence[str], environment: Mapping[str, str], facts: Mapping[str, Any]
) -> Failure | None:
    """Run one stage to its end, waiting for a process that already runs it; does nothing when its result is there."""
    while (lock := lock_folder(stage)) is None:
        time.sleep(_POLL_SECONDS)
    if is_whole(stage):
        os.close(lock)
        return None
    process = StageProcess(stage, lock, program, environment, facts)
    try:
        process.process.wait()
    except BaseException:
        process.signal(signal.SIGTERM)
        raise
    return process.finish()


class GroupProcess:
    """A command in a session of its own, whose output goes to the end of a log.

    Args:
        words: of the command.
        log: file.
        environment: variables that differ from this process's.
        hold: descriptor of a lock that the command holds, too: it may outlive this process.
    """

    def __init__(
        self, words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, hold: int | None = None
    ) -> None:
        self.log, self.started = log, time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            out.write(f"$ {shlex.join(words)}\n".encode())
            out.flush()
            self._log_from = out.tell()
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                pass_fds=() if hold is None else (hold,),
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self.started

    def code(self) -> int | None:
        """Its exit status, minus a signal's number; None while it runs."""
        return self.process.poll()

    def signal(self, number: int) -> None:
        """Send a signal to it and to all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait so long for its end, or until something is so; returns whether one of them came."""
        deadline = time.monotonic() + seconds
        while self.code() is None and not until():
            if time.monotonic() >= deadline:
                return False
            time.sleep(_SOON_SECONDS)
        return True

    def end(self, seconds: float) -> int:
        """SIGTERM, and SIGKILL if it still runs after so many seconds; returns its exit status."""
        self.signal(signal.SIGTERM)
        if not self.wait(seconds):
            self.signal(signal.SIGKILL)
        self.process.wait()
        self.clear()
        return self.process.returncode

    def clear(self) -> None:
        """Once it has ended: let what it started end, too; what does not is killed, for it may hold a GPU's memory."""
        deadline = time.monotonic() + _LEFTOVERS_SECONDS
        while time.monotonic() < deadline:
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(_SOON_SECONDS)
        self.signal(signal.SIGKILL)

    def tail(self) -> list[str]:
        """The last lines that it printed."""
        with self.log.open("rb") as log:
            log.seek(self._log_from)
            lines = log.read().decode(errors="replace").replace("\r", "\n").splitlines()
        return [line.rstrip() for line in lines if line.strip()][-_GROUP_TAIL:]


@contextmanager
def raising_signals() -> Iterator[None]:
    """SIGINT raises, even where a background shell ignores it; so do SIGTERM and SIGHUP."""

    def stop(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
