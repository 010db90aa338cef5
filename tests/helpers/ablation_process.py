"""A run of the small table in a process of its own, which tests may kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

from luve_lightning.ablations.graph import without
from luve_lightning.ablations.local_runner import LocalRunner, Slots
from tests.helpers.ablations import PROGRAM, Notes, planner_of

# As in tests/helpers/processes.py: the server has imported everything once.
_SERVER = multiprocessing.get_context("forkserver")


def start_run(folder: Path, root: Path, log: Path) -> BaseProcess:
    """Run all of a table's stages one after another; the program notes what it does in `log`."""
    _SERVER.set_forkserver_preload(["tests.helpers.ablation_process"])
    process = _SERVER.Process(target=_child, args=(folder, root, log))
    process.start()
    return process


def _child(folder: Path, root: Path, log: Path) -> None:
    # A shell ignores Ctrl-C on behalf of what it starts in the background, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["FAKE_LOG"] = str(log)
    planner = planner_of(folder, root)
    rows = {seed: list(planner.table.rows) for seed in planner.table.seeds}
    runner = LocalRunner(lambda lost: planner.plan(without(rows, lost)), Slots(1), PROGRAM, {}, Notes())
    sys.exit(len(runner.run().failures))
