"""`luve generate` in a process of its own, which tests may kill."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

import luve_lightning.cli.generate  # noqa: F401
from luve_lightning.__main__ import main

# As in tests/helpers/processes.py: the server has imported everything once.
_SERVER = multiprocessing.get_context("forkserver")


def start_generate(
    log: Path,
    *words: object,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], object] | None = None,
) -> BaseProcess:
    """`luve generate` with these words and further variables; what it prints goes to `log`.

    `prepare` is called in the process before anything else.
    """
    _SERVER.set_forkserver_preload(["tests.helpers.generate_process"])
    process = _SERVER.Process(
        target=_child, args=(log, [str(word) for word in words], dict(environment or {}), prepare)
    )
    process.start()
    return process


def finish(log: Path, *processes: BaseProcess) -> None:
    """Wait for processes that must end well."""
    try:
        for process in processes:
            process.join(150)
            assert process.exitcode == 0, log.read_text()
    finally:
        for process in processes:
            process.kill()


def _child(
    log: Path, words: list[str], environment: dict[str, str], prepare: Callable[[], object] | None
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= environment
    if prepare is not None:
        prepare()
    if not torch.accelerator.is_available():
        # diffusers' context parallelism divides by the number of accelerators before it finds that it needs none.
        torch.accelerator.device_count = lambda: 1
    sys.exit(main(["generate", *words]))
