"""A reader that one file ends, with its process. Alone here, as each process imports it again."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from luve_lightning.cli.index_probes import Probe, probe_file


def die_at_four(path: Path) -> tuple[Probe, bool]:
    """What `4.mp4` does to a decoder with a bug; other files are read."""
    if path.name == "4.mp4":
        os.kill(os.getpid(), signal.SIGKILL)
    return probe_file(path), True
