from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from luve_lightning.callbacks.provenance import Provenance, git_state


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_numbers_follow_each_other_and_nothing_is_overwritten(tmp_path: Path) -> None:
    first = Provenance("fit", "a: 1\n").write(tmp_path / "run", {"verb": "fit"})
    second = Provenance("test", "a: 2\n").write(tmp_path / "run", {"verb": "test"})
    assert (first.name, second.name) == ("provenance.json", "provenance-2.json")
    assert json.loads(first.read_text()) == {"verb": "fit", "config": "config.yaml"}
    assert json.loads(second.read_text()) == {"verb": "test", "config": "config-2.yaml"}
    assert (tmp_path / "run" / "config.yaml").read_text() == "a: 1\n"
    assert (tmp_path / "run" / "config-2.yaml").read_text() == "a: 2\n"
    assert len(list((tmp_path / "run").iterdir())) == 4  # no temporary file stays


def test_writers_at_the_same_time_get_different_numbers(tmp_path: Path) -> None:
    def write(number: int) -> Path:
        return Provenance("fit", f"n: {number}\n").write(tmp_path, {"n": number})

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(write, range(24)))
    assert len(set(paths)) == 24
    for number, path in enumerate(paths):
        provenance = json.loads(path.read_text())
        assert provenance["n"] == number
        assert (tmp_path / provenance["config"]).read_text() == f"n: {number}\n"


def test_git_state_names_the_revision_and_changes(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-q", "-m", "first")
    revision = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("1")
    assert git_state(tmp_path) == {"revision": revision, "dirty": False}
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {"revision": revision, "dirty": True}


def test_git_state_ignores_a_repository_around_the_folder(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "a").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    assert git_state(tmp_path / "site-packages") is None
