"""Locks have one owner; writes are whole or not there, whatever ends the process."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from luve_lightning.files import (
    check_writable,
    follow_umask,
    hub_digest,
    new_file_mode,
    one_ahead,
    one_behind,
    remove_unfinished,
    replacing,
    replacing_folder,
    unfinished_path,
    write_text,
)
from luve_lightning.locks import Busy, Owner, locked
from tests.helpers.unwritable import forbid_writing

_HOLDS = """
import os, sys, time
from pathlib import Path
from luve_lightning.locks import locked
with locked(Path(sys.argv[1]), what="x"):
    child = os.fork()  # as a loader's worker is
    if not child:
        print(os.getpid(), flush=True)  # the child's, once it has let go of the lock
    time.sleep(600)
"""
_REPLACES = """
import sys
from pathlib import Path
from luve_lightning.files import replacing, replacing_folder
folder, number = Path(sys.argv[1]), 0
print("ready", flush=True)
while True:
    number += 1
    with replacing_folder(folder / "model", last=("config.json",)) as new:
        for name in ("config.json", "weights", "part/weights"):
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text(f"{number} " * 2000)
    with replacing(folder / "file") as new:
        new.write_text(f"{number} " * 2000)
"""


@contextmanager
def running(program: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that has printed its first line, ended by SIGKILL."""
    words = [sys.executable, "-c", program, *map(str, arguments)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_a_lock_has_one_owner_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "run" / ".lock"
    with running(_HOLDS, path) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            with pytest.raises(Busy) as refused, locked(path, what="run folder x"):
                pass
            owner = refused.value.owner
            assert (owner.pid, owner.host) == (process.pid, socket.gethostname())
            assert str(refused.value) == (
                f"run folder x is in use by process {process.pid} on {owner.host}, since {owner.since}"
            )
            process.kill()
            process.wait()
            with locked(path, what="x"):  # although the forked child lives, and the file is still there
                assert Owner.read(path).pid == os.getpid()
                with pytest.raises(Busy), locked(path, what="x"):
                    pass
        finally:
            os.kill(child, 9)
    assert list(path.parent.iterdir()) == []


def test_a_file_system_without_locks_is_told_and_its_living_owner_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    path = tmp_path / ".lock"
    with (
        pytest.warns(UserWarning, match="has no locks"),
        locked(path, what="x"),
        pytest.raises(Busy, match=f"process {os.getpid()} on"),
        locked(path, what="x"),
    ):
        pass
    with subprocess.Popen(["true"]) as gone:
        pass
    path.write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname(), "since": "then"}))
    with pytest.warns(UserWarning, match="has no locks"), locked(path, what="x"):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1}'])
def test_a_lock_file_that_names_nobody(tmp_path: Path, text: str) -> None:
    path = tmp_path / ".lock"
    path.write_text(text)
    assert str(Owner.read(path)) == "another process"
    with locked(path, what="x"):
        assert Owner.read(path).pid == os.getpid()


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_have_the_permissions_of_the_umask(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        (tmp_path / "deep").mkdir()
        for name in ("deep/a", "b"):
            (tmp_path / name).touch(mode=0o600)
        follow_umask(tmp_path)
        with replacing(tmp_path / "c") as new:
            new.unlink()  # as safetensors does: it writes elsewhere and renames
            new.touch(mode=0o600)
        with replacing_folder(tmp_path / "d") as new:
            (new / "e").touch(mode=0o600)
        assert new_file_mode() == 0o666 & ~mask
        for name in ("deep/a", "b", "c", "d/e"):
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~mask, name
        assert (tmp_path / "d").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file, folder = tmp_path / "a", tmp_path / "b"
    file.write_text("old")
    folder.mkdir()
    (folder / "c").write_text("old")
    with pytest.raises(FileExistsError), replacing(file) as new:
        os.mkdir(new)  # noqa: PTH102 (fails: the temporary file is there)
    with pytest.raises(FileNotFoundError), replacing_folder(folder) as new:
        (new / "c" / "d").write_text("new")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "c"]
    assert file.read_text() == (folder / "c").read_text() == "old"


def test_text_is_written_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "table.csv"
    write_text(target, "old")
    write_text(target, "newer")
    assert target.read_text() == "newer"
    with pytest.raises(UnicodeEncodeError):
        write_text(target, "x" * 100_000 + "\ud800")
    assert target.read_text() == "newer"
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_keeps_what_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "link"
    (tmp_path / "real" / "checkpoints").mkdir(parents=True)
    folder.symlink_to("real")
    for round_ in ("1", "2"):
        with replacing_folder(folder, last=("config.json",)) as new:
            (new / "config.json").write_text(round_)
            (new / "transformer").mkdir()
            (new / "transformer" / f"weights-{round_}").write_text(round_)
    assert folder.is_symlink()
    names = sorted(str(path.relative_to(tmp_path / "real")) for path in (tmp_path / "real").rglob("*"))
    assert names == ["checkpoints", "config.json", "transformer", "transformer/weights-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_unfinished_files_of_the_living_stay(tmp_path: Path) -> None:
    mine = unfinished_path(tmp_path / "last.ckpt")
    with subprocess.Popen(["true"]) as gone:
        pass
    host = mine.name.removeprefix(".unfinished-").partition(".")[0]
    dead = tmp_path / f".unfinished-{host}.{gone.pid}.last.ckpt.tmp"
    elsewhere = tmp_path / ".unfinished-another.1.last.ckpt.tmp"
    held = tmp_path / ".unfinished-another.2.last.ckpt.tmp"
    foreign = tmp_path / ".unfinished-notes.tmp"
    for path in (mine, dead, elsewhere, held, foreign):
        path.touch()
    with held.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert remove_unfinished(tmp_path) == 2
    assert sorted(tmp_path.iterdir()) == sorted([mine, held, foreign])


@pytest.mark.parametrize("name", ["長" * 85, "a" * 255, "a.b"])
def test_temporary_names_fit_where_the_name_does(tmp_path: Path, name: str) -> None:
    for _ in range(2):
        with replacing(tmp_path / name) as new:
            new.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.slow
@pytest.mark.parametrize("foreign", [False, True])
def test_a_kill_at_any_moment_leaves_old_or_new(tmp_path: Path, foreign: bool) -> None:
    if foreign:  # the folder cannot change places as a whole
        (tmp_path / "model" / "other").mkdir(parents=True)
    cut = 0
    for kill in range(60):
        if kill >= 12 and cut:
            break
        with running(_REPLACES, tmp_path) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(random.Random(kill).uniform(0.005, 0.05))  # the moment is arbitrary, not waited for
        cut += bool([*tmp_path.glob(".unfinished-*"), *tmp_path.glob("model/.unfinished-*")])
        model = tmp_path / "model"
        if (model / "config.json").exists():
            texts = [(model / name).read_text() for name in ("config.json", "weights", "part/weights")]
            assert len(set(texts)) == 1
            assert len(texts[0].split()) == 2000
        elif not foreign:
            assert not model.exists()
        if (tmp_path / "file").exists():
            assert len((tmp_path / "file").read_text().split()) == 2000
    assert cut, "no kill fell into a write: the test shows nothing"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_what_cannot_be_written_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    check_writable(tmp_path / "new" / "file")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "new" / "old").write_text("as it was")
    check_writable(tmp_path / "new" / "old")
    with pytest.raises(NotADirectoryError, match="old/file"):
        check_writable(tmp_path / "new" / "old" / "file")
    forbid_writing(monkeypatch, tmp_path / "new", number)
    with pytest.raises(OSError, match=f"{os.strerror(number)}: .*new/old'$"):
        check_writable(tmp_path / "new" / "old")
    assert (tmp_path / "new" / "old").read_text() == "as it was"


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "HPSv3.safetensors"
    file.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert hub_digest(file) == digest
    file.write_bytes(b"other weights")
    assert hub_digest(file) != digest


def test_the_hub_cache_names_a_file_by_its_digest(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("0a" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"not read, so it need not be the real content")
    link = tmp_path / "snapshots" / "main" / "HPSv3.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    assert hub_digest(link) == "0a" * 32


def test_calls_behind_run_in_order_beside_the_caller_and_the_end_waits_for_the_last() -> None:
    entered, go_on, done = threading.Event(), threading.Event(), []

    def first() -> None:
        entered.set()
        assert go_on.wait(60)
        done.append("first")

    with one_behind() as behind:
        behind(first)
        assert entered.wait(60)
        assert not done  # the caller goes on while it runs
        go_on.set()
        behind(lambda: done.append("second"))
        assert done[:1] == ["first"]
    assert done == ["first", "second"]


def test_as_many_calls_as_may_wait_do_not_keep_the_caller() -> None:
    go_on, third, done = threading.Event(), threading.Event(), list[int]()

    def call(number: int) -> None:
        assert go_on.wait(60)
        done.append(number)

    def run() -> None:
        with one_behind(waiting=1) as behind:
            for number in range(3):
                behind(partial(call, number))
            third.set()

    caller = threading.Thread(target=run)
    caller.start()
    assert not third.wait(0.2), "one runs and one waits, and there is no room for another"
    go_on.set()
    caller.join(60)
    assert (third.is_set(), done) == (True, [0, 1, 2])


def test_the_next_item_is_read_while_the_caller_uses_the_last_and_no_other() -> None:
    begun = [threading.Event() for _ in range(4)]

    def read(number: int) -> int:
        begun[number].set()
        if number == 1:
            raise ValueError("broken")
        return number

    with one_ahead(read, range(4)) as results:
        assert next(results).result() == 0
        assert begun[1].wait(60)
        assert not begun[2].wait(0.1)
        with pytest.raises(ValueError, match="broken"):
            next(results).result()
        assert next(results).result() == 2
        assert begun[3].wait(60)
        assert [one.result() for one in results] == [3]
    with one_ahead(read, []) as results:
        assert not list(results)


def test_what_was_not_begun_when_the_caller_leaves_is_not_begun_any_more() -> None:
    go_on, begun = threading.Event(), list[int]()

    def read(number: int) -> None:
        begun.append(number)
        assert go_on.wait(60)

    with one_ahead(read, range(3)) as results:
        next(results)
        threading.Timer(0.2, go_on.set).start()
    assert begun == [0]


@pytest.mark.parametrize("more", [[], [lambda: None]], ids=["at the end", "at the next call"])
def test_what_a_call_behind_raises_reaches_the_caller(more: list[Callable[[], None]]) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    def run() -> None:
        with one_behind() as behind:
            for call in [fail, *more]:
                behind(call)

    with pytest.raises(OSError, match="No space left"):
        run()
