"""The running checkout: its folder and its git revision."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

PACKAGE_ROOT = Path(__file__).resolve().parents[1]


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
    return {
        "revision": revision,
        "dirty": bool(run_git(folder, "status", "--porcelain", "--untracked-files=no")),
    }


def revision_in_words(folder: Path = PACKAGE_ROOT) -> str:
    """The revision as results name it: 40 hex digits, perhaps followed by `with changes`, or `unknown`."""
    state = git_state(folder)
    return "unknown" if state is None else state["revision"] + " with changes" * state["dirty"]


def run_git(folder: Path, *arguments: str) -> str | None:
    """The output of `git` in `folder`, stripped; None where it fails or is not installed."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
