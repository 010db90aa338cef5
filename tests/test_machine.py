from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from luve_lightning.machine import (
    UnitTimes,
    git_state,
    package_version,
    package_versions,
    revision_in_words,
    visible_gpus,
)
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


def test_units_are_timed_from_the_end_of_one_to_the_end_of_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = iter([0.0, 0.0, 10.0, 50.0, 52.0, 55.0, 100.0, 108.0, 110.0])
    monkeypatch.setattr(time, "perf_counter", clock.__next__)
    times = UnitTimes("step")
    times.begin()  # at 10
    times.advance()  # 40 s: the first one
    times.advance()  # 2 s
    times.advance()  # 3 s
    times.begin()  # a validation until 100
    times.advance(2)  # 8 s, two together
    times.write(tmp_path / "new" / "measured.json", step=5)
    assert json.loads((tmp_path / "new" / "measured.json").read_text()) == {
        "unit": "step",
        "done": 5,
        "seconds": 110.0,
        "first_seconds": 40.0,
        "seconds_per_unit": 3.0,
        "peak_gib": None,
        "step": 5,
    }
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["measured.json"]


def test_nothing_is_said_of_units_that_were_not(tmp_path: Path) -> None:
    found = UnitTimes("clip").record()
    assert (found["done"], found["first_seconds"], found["seconds_per_unit"]) == (0, None, None)
    UnitTimes("clip").write(None)


def test_gpus_are_listed_without_one_being_touched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho NVIDIA H100\necho NVIDIA H100\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for visible, count in ((None, 2), ("1", 1), ("", 0)):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert visible_gpus() == ["NVIDIA H100"] * count
    program.write_text("#!/bin/sh\nexit 9\n")
    assert visible_gpus() == []


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
