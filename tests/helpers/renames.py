"""Something done at a known moment of another process, so that no test has to be quick enough."""

from __future__ import annotations

import fnmatch
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

KILLED = "from tests.helpers.renames import kill_before; kill_before({!r}, {!r})\n"


def before_rename(pattern: str, number: int, do: Callable[[], object]) -> None:
    """Call a function just before this process gives a file, the number-th time, a name that fits a pattern.

    Whatever is written in one piece is written under another name and renamed.

    Args:
        pattern: as `fnmatch` has it, of the whole path.
        number: 1 is the first rename.
        do: what is called.
    """
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "os.rename" and fnmatch.fnmatch(os.fspath(arguments[1]), pattern):
            seen += 1
            if seen == number:
                do()

    sys.addaudithook(hook)


def kill_before(pattern: str, number: int) -> None:
    """Let SIGKILL strike this process just before such a rename."""
    before_rename(pattern, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
