"""A run of the small table in a process of its own, which tests may kill."""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

from luve_lightning.ablations.graph import without
from luve_lightning.ablations.runners import LocalRunner, Slots
from tests.helpers.ablations import PROGRAM, Notes, planner_of
from tests.helpers.fork_server import start_process


def start_run(folder: Path, root: Path, log: Path) -> BaseProcess:
    """Run all of a table's stages one after another; the program notes what it does in `log`."""
    return start_process(_child, folder, root, log)


def _child(folder: Path, root: Path, log: Path) -> None:
    # A shell ignores Ctrl-C on behalf of what it starts in the background, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["FAKE_LOG"] = str(log)
    planner = planner_of(folder, root)
    rows = {seed: list(planner.table.rows) for seed in planner.table.seeds}
    runner = LocalRunner(lambda lost: planner.plan(without(rows, lost)), Slots(1), PROGRAM, {}, Notes())
    sys.exit(len(runner.run().failures))
