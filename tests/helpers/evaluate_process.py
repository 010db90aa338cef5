"""`luve evaluate` in a process of its own, which tests may kill."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import luve_lightning.cli.evaluate
import luve_lightning.metrics  # noqa: F401
from luve_lightning.__main__ import main

# As in tests/helpers/processes.py: the server has imported everything once.
_SERVER = multiprocessing.get_context("forkserver")


def start_evaluate(*words: object, prepare: Callable[[], object] | None = None) -> BaseProcess:
    """`luve evaluate` with these words; `prepare` is called in the process before anything else."""
    _SERVER.set_forkserver_preload(["tests.helpers.evaluate_process"])
    process = _SERVER.Process(target=_child, args=([str(word) for word in words], prepare))
    process.start()
    return process


def _child(words: list[str], prepare: Callable[[], object] | None) -> None:
    if prepare is not None:
        prepare()
    sys.exit(main(["evaluate", *words]))
