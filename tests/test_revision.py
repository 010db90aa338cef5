"""The checkout is named by its revision, packages by the versions that are imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from luve_lightning.revision import git_state, package_version, package_versions, revision_in_words
from tests.helpers.git import git


def test_git_state_names_the_revision_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) is None  # no commit yet
    assert revision_in_words(tmp_path) == "unknown"
    monkeypatch.setenv("LUVE_REVISION", "abc1234, copied")
    assert revision_in_words(tmp_path) == "abc1234, copied"
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


def test_the_package_has_a_version() -> None:
    assert package_version()[0].isdigit()


def test_versions_are_of_what_is_imported_whatever_lies_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = dict(package_versions())
    for folder, text in (
        ("torch-0.0.1.dist-info", "Metadata-Version: 2.1\nName: torch\nVersion: 0.0.1\n"),
        ("-left.dist-info", "Metadata-Version: 2.1\n"),
        ("empty.dist-info", None),
    ):
        (tmp_path / folder).mkdir()
        if text is not None:
            (tmp_path / folder / "METADATA").write_text(text)
    package_versions.cache_clear()
    try:
        monkeypatch.syspath_prepend(tmp_path)
        assert package_versions() == installed | {"torch": "0.0.1"}
        package_versions.cache_clear()
        monkeypatch.undo()
        monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path)])
        assert package_versions() == installed
    finally:
        package_versions.cache_clear()
