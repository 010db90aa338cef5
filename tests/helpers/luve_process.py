"""The `luve` command in a process of its own, which tests may kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
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
        try:
            self.process.join(150)
            assert self.process.exitcode == code, self.text()
        finally:
            self.process.kill()
        return self.text()


def _child(log: Path, words: list[str], environment: dict[str, str], prepare: Callable[[], object] | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.setsid()
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
    sys.exit(main(words))
