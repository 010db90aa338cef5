"""Which code runs: the checkout's revision, and the versions of installed packages."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from luve_lightning.machine import PACKAGE_ROOT


def package_version() -> str:
    """This package's version, or "not installed" where it runs from a checkout alone."""
    return package_versions().get("luve-lightning", "not installed")


@cache
def package_versions() -> Mapping[str, str]:
    """Version of each installed package by its name, sorted; read once, since it takes 200 files."""
    found: dict[str, str] = {}
    for package in metadata.distributions():
        record = package.metadata
        # What pip left of a removal it broke off has a folder without a name.
        if record and "Name" in record and "Version" in record:
            found.setdefault(record["Name"], record["Version"])  # of two on the path, the first is imported
    return dict(sorted(found.items()))


def git_state(folder: Path) -> dict[str, Any] | None:
    """The revision checked out in `folder` and whether tracked files differ from it.

    Returns:
        `{"revision": 40 hex digits, "dirty": bool}`, or None when `folder` is not the top of a git checkout with
        at least one commit (a package installed inside somebody else's repository must not name their revision).
    """
    top = run_git(folder, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != folder.resolve():
        return None
    revision = run_git(folder, "rev-parse", "--verify", "HEAD")
    if revision is None:
        return None
    return {"revision": revision, "dirty": bool(run_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def revision_in_words(folder: Path = PACKAGE_ROOT) -> str:
    """The revision as results name it: 40 hex digits, perhaps followed by `with changes`.

    Without a git checkout it is what $LUVE_REVISION says, as for a copy of one's files, else `unknown`.
    """
    state = git_state(folder)
    if state is None:
        return os.environ.get("LUVE_REVISION", "").strip() or "unknown"
    return state["revision"] + " with changes" * state["dirty"]


def run_git(folder: Path, *arguments: str) -> str | None:
    """The output of `git` in `folder`, stripped; None where it fails or is not installed."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
