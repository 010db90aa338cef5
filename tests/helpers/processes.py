"""Runs in processes of their own, which tests may kill."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from tests.helpers.fork_server import start_process
from tests.helpers.resumable import Run, train

_AFTER_A_FAILURE = 60  # seconds in which the others, which may wait for the one that failed, must end


def start(run: Run, function: Any = train) -> list[BaseProcess]:
    """Start a run in processes of its own, one a rank."""
    port = free_port()
    return [start_process(_child, function, run, rank, port) for rank in range(run.processes)]


def finish(processes: list[BaseProcess], timeout: float = 120) -> list[int | None]:
    """Exit statuses; a process that does not end in time is killed and counts as None."""
    deadline = time.monotonic() + timeout
    running: dict[Any, BaseProcess] = {process.sentinel: process for process in processes}
    try:
        while running and (ended := wait(list(running), max(0.0, deadline - time.monotonic()))):
            for one in map(running.pop, ended):
                one.join()
                if one.exitcode != 0:
                    deadline = min(deadline, time.monotonic() + _AFTER_A_FAILURE)
        return [process.exitcode for process in processes]
    finally:  # also when pytest's own timeout strikes: the interpreter would wait for them at its end
        for process in processes:
            process.kill()


def run_processes(run: Run, function: Any = train) -> list[int | None]:
    """Exit statuses. What each process has printed last is printed, which pytest shows when a test fails."""
    statuses = finish(start(run, function))
    for rank, status in enumerate(statuses):
        output = run.folder / f"output-{rank}.txt"
        text = output.read_text() if output.exists() else ""
        print(f"--- process {rank} of {run.processes} ended with {status}:", *text.splitlines()[-30:], sep="\n")
    return statuses


def _child(function: Any, run: Run, rank: int, port: int) -> None:
    output = run.folder / f"output-{rank}.txt"
    output.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # Loaders' workers: the server's children would start theirs by a server of their own.
    multiprocessing.set_start_method("fork", force=True)
    if run.processes > 1:
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(run.processes),
            "NODE_RANK": "0",
            "LOCAL_RANK": str(rank),
        }
    function(run)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
