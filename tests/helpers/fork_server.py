"""A server that has imported everything once; each process of it is a fork within a fraction of a second.

It has none of the threads that make a plain fork of the test process unsafe. A test process has one server: it is
started with the first process and imports what all of them need, whichever test is the first.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from contextlib import chdir
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
_SERVER = multiprocessing.get_context("forkserver")
_NEEDED = [f"tests.helpers.{name}" for name in ("luve_process", "processes", "ablation_process", "as_user")]


def start_server() -> None:
    """Start the server, which is multiprocessing's one for this process, unless it runs."""
    _SERVER.set_forkserver_preload(_NEEDED)
    with chdir(REPOSITORY):  # where it finds them; it skips in silence what it does not find
        ensure_running()


def start_process(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a process that runs a function of a module, not a closure, in the current folder."""
    start_server()
    process = _SERVER.Process(target=function, args=arguments)
    process.start()
    return process
