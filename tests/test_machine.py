from __future__ import annotations

import os
from pathlib import Path

from luve_lightning.machine import git_state, revision_in_words
from tests.helpers.git import git


def test_git_state_names_the_revision_and_changes(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) is None  # no commit yet
    assert revision_in_words(tmp_path) == "unknown"
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-q", "-m", "first")
    revision = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("1")
    assert git_state(tmp_path) == {"revision": revision, "dirty": False}
    assert revision_in_words(tmp_path) == revision
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {"revision": revision, "dirty": True}
    assert revision_in_words(tmp_path) == f"{revision} with changes"


def test_git_state_leaves_the_index_alone(tmp_path: Path) -> None:
    """A run that is killed meanwhile would leave `index.lock`, after which git refuses the user's commands."""
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-q", "-m", "first")
    index = tmp_path / ".git" / "index"
    os.utime(tmp_path / "a", (1, 1))  # what makes git refresh its index
    before = index.read_bytes()
    state = git_state(tmp_path)
    assert state is not None
    assert not state["dirty"]
    assert index.read_bytes() == before


def test_git_state_ignores_a_repository_around_the_folder(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "a").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    assert git_state(tmp_path / "site-packages") is None
