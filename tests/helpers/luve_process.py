"""The `luve` command in a process of its own, which tests may kill."""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

import luve_lightning.cli.evaluate
import luve_lightning.cli.generate
import luve_lightning.cli.precompute
import luve_lightning.cli.ratings
import luve_lightning.metrics  # noqa: F401
from luve_lightning.__main__ import main
from tests.helpers.fork_server import start_process

_SHOW_STACKS = signal.SIGUSR2
_TAIL = 20  # lines of a process that is not to blame


class LuveProcess:
    """One run of the command.

    It leads a process group, as a job of SLURM or a command under `timeout` does.

    Args:
        log: file that what it prints is added to.
        words: of the command line, the verb first.
        environment: more variables.
        prepare: called in the process before anything else.
    """

    def __init__(
        self,
        log: Path,
        *words: object,
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        self.log = log
        log.touch()
        self.process = start_process(_child, log, [str(word) for word in words], dict(environment or {}), prepare)

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def alive(self) -> bool:
        return self.process.is_alive()

    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, but not the processes that it has started."""
        os.kill(self.pid, number)

    def finish(self, code: int = 0) -> str:
        """Wait for the end, which is an exit status or minus a signal; returns what it printed."""
        return finish_together([self], [code], limit=150)[0]


def finish_together(
    processes: Sequence[LuveProcess], codes: Sequence[int] | None = None, limit: float = 100
) -> list[str]:
    """Wait for processes that belong together; returns what each printed.

    As soon as one ends in another way than it should, the others, which may wait for it for ever, are killed. When
    the time is over, those that have not ended print where each of their threads is.

    Args:
        processes: All are killed before this returns.
        codes: of each, an exit status or minus a signal; 0 unless told.
        limit: seconds for all of them.

    Raises:
        AssertionError: The text holds what those to blame have printed, and the last lines of the others.
    """
    expected = [0] * len(processes) if codes is None else list(codes)
    how: dict[int, str] = {}
    blamed: set[int] = set()
    began = time.monotonic()
    try:
        while len(how) < len(processes) and not blamed:
            running = {one.process.sentinel: place for place, one in enumerate(processes) if place not in how}
            ended = [running[found] for found in wait(list(running), max(0, began + limit - time.monotonic()))]
            for place in ended:
                processes[place].process.join()
                status = processes[place].process.exitcode
                how[place] = f"ended with {status} after {time.monotonic() - began:.1f} s"
                if status != expected[place]:
                    blamed.add(place)
            if not ended:
                blamed = set(running.values())
                how |= dict.fromkeys(blamed, f"runs after {limit:g} s")
                _show_stacks([processes[place] for place in blamed])
    finally:
        for one in processes:
            one.process.kill()
    if blamed:
        raise AssertionError(_report(processes, blamed, how))
    return [one.text() for one in processes]


def _show_stacks(running: Sequence[LuveProcess]) -> None:
    for one in running:
        one.send(_SHOW_STACKS)
    time.sleep(1)  # they take milliseconds, on a busy machine a few more


def _report(processes: Sequence[LuveProcess], blamed: set[int], how: Mapping[int, str]) -> str:
    """What to read first comes last."""
    parts = ["of processes that belong together:"]
    for place in sorted(range(len(processes)), key=blamed.__contains__):
        lines = processes[place].text().splitlines()
        parts.append(f"--- {processes[place].log.name} {how.get(place, 'was killed')}:")
        parts += lines if place in blamed else lines[-_TAIL:]
    return "\n".join(parts)


def _child(log: Path, words: list[str], environment: dict[str, str], prepare: Callable[[], object] | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.setsid()
    faulthandler.register(_SHOW_STACKS, 2)
    atexit._clear()  # what the server registered
    # Loaders' workers: the server's children would start theirs by a server of their own.
    multiprocessing.set_start_method("fork", force=True)
    os.environ |= environment
    if "RANK" in environment:  # Lightning reads it when it is imported, which it is already
        rank: Any = rank_zero_only
        rank.rank = int(environment["RANK"])
    if prepare is not None:
        prepare()
    if not torch.accelerator.is_available():
        # diffusers' context parallelism divides by the number of accelerators before it finds that it needs none.
        torch.accelerator.device_count = lambda: 1
    try:
        code = main(words)
    finally:
        # As at the end of a program, which multiprocessing's children skip. Without, one that has left NCCL something
        # to do ends before it is done, and others wait for it for ever.
        atexit._run_exitfuncs()
    sys.exit(code)
