"""Other users of this machine: processes with a user, a group and a umask of their own."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fork_server import start_process

_CANNOT_READ = 77


def run_as(user: int, group: int, umask: int, function: Callable[..., None], *arguments: Any) -> str:
    """Run a function as somebody else, and return what it printed; skips where only one user can be had.

    Args:
        user: id, which needs no entry in the system's list.
        group: id of the one group.
        umask: of the process.
        function: of a module, not a closure; what it raises fails the test.
        arguments: of it.
    """
    if os.geteuid() != 0:
        pytest.skip("needs root, to start processes of other users")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        home.chmod(0o777)
        printed = home / "printed"
        process = start_process(_child, user, group, umask, home, printed, function, arguments)
        process.join(300)
        process.kill()
        text = printed.read_text(encoding="utf-8")
        if process.exitcode == _CANNOT_READ:
            pytest.skip("other users cannot read this environment")
        assert process.exitcode == 0, text
        return text


def _child(
    user: int,
    group: int,
    umask: int,
    home: Path,
    printed: Path,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    stream = printed.open("w", encoding="utf-8", buffering=1)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    os.setgroups([])
    os.setgid(group)
    _set_user(user)
    os.umask(umask)
    os.environ |= {"HOME": str(home), "TMPDIR": str(home), "LOGNAME": f"user{user}"}
    if not all(_can_read(Path(file)) for file in (__file__, os.__file__)):
        os._exit(_CANNOT_READ)
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    stream.flush()
    os._exit(0)


def _set_user(user: int) -> None:
    """Become a user who may read everything, as this environment may lie below root's home, and write nothing more."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    os.setuid(user)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # the version with two words a set; this process
    read_search = 1 << 2  # CAP_DAC_READ_SEARCH
    sets = (ctypes.c_uint32 * 6)(read_search, read_search, 0, 0, 0, 0)  # effective, permitted, inheritable
    libc.capset(header, sets)


def _can_read(path: Path) -> bool:
    try:
        path.open("rb").close()
    except OSError:
        return False
    return True
