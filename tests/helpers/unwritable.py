"""Folders that may not be written, also for root, whom permissions do not stop."""

from __future__ import annotations

import builtins
import os
from pathlib import Path
from typing import Any

import pytest

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def forbid_writing(monkeypatch: pytest.MonkeyPatch, folder: Path, number: int) -> None:
    """Let whatever writes below a folder fail as on a read-only, forbidden or full disk.

    Args:
        monkeypatch: undoes it.
        folder: with everything in it.
        number: the error's errno.
    """
    top = folder.resolve()

    def refuse(path: Any) -> None:
        if isinstance(path, str | os.PathLike) and Path(path).absolute().is_relative_to(top):
            raise OSError(number, os.strerror(number), os.fspath(path))

    def guarded(function: Any, writes: Any = lambda *rest, **more: True) -> Any:
        def call(path: Any, *rest: Any, **more: Any) -> Any:
            if writes(*rest, **more):
                refuse(path)
            return function(path, *rest, **more)

        return call

    monkeypatch.setattr(os, "open", guarded(os.open, lambda flags, *rest, **more: bool(flags & _WRITES)))
    # Not for folders that exist: a system answers that they do.
    mkdir = os.mkdir

    def make(path: Any, *rest: Any, **more: Any) -> None:
        if not Path(path).exists():
            refuse(path)
        mkdir(path, *rest, **more)

    monkeypatch.setattr(os, "mkdir", make)
    for name in ("unlink", "rename", "replace", "chmod"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    by_mode = guarded(builtins.open, lambda mode="r", *rest, **more: bool(set(mode) & set("wax+")))
    monkeypatch.setattr(builtins, "open", by_mode)
    monkeypatch.setattr("io.open", by_mode)
