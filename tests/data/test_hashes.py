"""Remembered hashes: right, shared, and never of other bytes."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from luve_lightning.data import hashes as file_hashes
from luve_lightning.data.hashes import FileHashes
from tests.helpers.unwritable import forbid_writing
from tests.helpers.waiting import wait_for


def settled_file(path: Path, content: bytes) -> Path:
    """A file that was last touched long ago, as far as the cache can tell."""
    path.write_bytes(content)
    return path


def change(file: Path, do: Callable[[], object]) -> None:
    """Does it until the inode's time differs: one tick of a file system's clock may be milliseconds."""
    before = file.stat().st_ctime_ns
    assert wait_for(lambda: (do(), file.stat().st_ctime_ns != before)[1])


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # The inode time cannot be set back, so the wait for a settled file is shortened instead.
    monkeypatch.setattr(file_hashes, "_SETTLED_NS", 0)


def test_digest_is_sha256_of_the_bytes(tmp_path: Path) -> None:
    file = settled_file(tmp_path / "a.mp4", b"some bytes" * 1000)
    assert FileHashes(tmp_path).digest(file) == hashlib.sha256(b"some bytes" * 1000).hexdigest()


def test_many_files_are_hashed_in_their_order(tmp_path: Path) -> None:
    files = [settled_file(tmp_path / f"{i}.safetensors", b"%d" % (i % 9) * (i + 1)) for i in range(20)]
    hashes = FileHashes(tmp_path / "store")
    hashes.digest(files[3])
    asked = [*files, files[5]]
    assert hashes.digests(asked) == [hashlib.sha256(file.read_bytes()).hexdigest() for file in asked]
    assert len((tmp_path / "store" / "file_hashes.jsonl").read_text().splitlines()) == len(files)
    assert hashes.digests([]) == []
    with pytest.raises(FileNotFoundError, match="missing"):
        hashes.digests([*files, tmp_path / "missing.safetensors"])


def test_files_that_are_read_ahead_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [settled_file(tmp_path / f"{i}.safetensors", b"%d" % i * (i + 1)) for i in range(20)]
    read: list[Path] = []
    one = file_hashes.file_digest
    monkeypatch.setattr(file_hashes, "file_digest", lambda path: (read.append(path), one(path))[1])
    hashes = FileHashes(tmp_path / "store")
    hashes.begin([*files, files[0], tmp_path / "missing.safetensors", tmp_path])
    assert wait_for(lambda: len(read) == len(files))
    change(files[1], lambda: files[1].write_bytes(b"other"))
    assert hashes.digests(files) == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert sorted(read) == sorted([*files, files[1]]), "what changed since is read again"
    assert len((tmp_path / "store" / "file_hashes.jsonl").read_text().splitlines()) == len(files)
    hashes.begin(files)
    assert len(read) == len(files) + 1, "they are known"
    with pytest.raises(FileNotFoundError, match="missing"):
        hashes.digest(tmp_path / "missing.safetensors")
    with pytest.raises(OSError, match="not a file"):
        hashes.digest(tmp_path)


def test_bytes_are_read_once(tmp_path: Path) -> None:
    file = settled_file(tmp_path / "a.mp4", b"x")
    digest = FileHashes(tmp_path / "store").digest(file)
    change(file, lambda: file.chmod(0))  # root reads it all the same, so look at what is remembered instead
    assert FileHashes(tmp_path / "store").known(file) is None, "chmod moves the inode time: hash again"
    digest_again = FileHashes(tmp_path / "store").digest(file)
    lines = (tmp_path / "store" / "file_hashes.jsonl").read_text().splitlines()
    assert digest_again == digest
    assert len(lines) == 2
    for _ in range(3):
        assert FileHashes(tmp_path / "store").known(file) == digest
        assert FileHashes(tmp_path / "store").digest(file) == digest
    assert (tmp_path / "store" / "file_hashes.jsonl").read_text().splitlines() == lines


def test_another_object_sees_what_was_appended(tmp_path: Path) -> None:
    first, second = FileHashes(tmp_path), FileHashes(tmp_path)
    one = settled_file(tmp_path / "1", b"1")
    assert second.known(one) is None
    digest = first.digest(one)
    assert second.known(one) == digest


def test_changed_bytes_are_hashed_again_even_with_the_old_times(tmp_path: Path) -> None:
    file = settled_file(tmp_path / "a", b"old bytes")
    hashes = FileHashes(tmp_path)
    old = hashes.digest(file)
    times = file.stat()
    change(file, lambda: file.write_bytes(b"new bytes"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as rsync -t does
    assert hashes.known(file) is None
    assert hashes.digest(file) != old
    assert FileHashes(tmp_path).digest(file) == hashlib.sha256(b"new bytes").hexdigest()


@pytest.mark.slow
def test_file_touched_just_now_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_hashes, "_SETTLED_NS", 3600 * 10**9)
    file = tmp_path / "a"
    file.write_bytes(b"a")
    hashes = FileHashes(tmp_path / "store")
    assert hashes.digest(file) == hashlib.sha256(b"a").hexdigest()
    assert hashes.known(file) is None
    now = file_hashes.time.time_ns()
    monkeypatch.setattr(file_hashes.time, "time_ns", lambda: now + 3601 * 10**9)
    hashes.digest(file)
    assert hashes.known(file) == hashlib.sha256(b"a").hexdigest()


def test_torn_line_costs_one_hash_only(tmp_path: Path) -> None:
    one, two = settled_file(tmp_path / "1", b"1"), settled_file(tmp_path / "2", b"2")
    hashes = FileHashes(tmp_path)
    hashes.digest(one)
    hashes.digest(two)
    cache = tmp_path / "file_hashes.jsonl"
    os.truncate(cache, cache.stat().st_size - 20)  # killed while it wrote the second line
    again = FileHashes(tmp_path)
    assert again.known(one) is not None
    assert again.known(two) is None
    digest = again.digest(two)
    assert FileHashes(tmp_path).known(two) == digest
    assert FileHashes(tmp_path).known(one) is not None


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FileHashes(tmp_path).digest(tmp_path / "nothing.mp4")
    with pytest.raises(FileNotFoundError):
        FileHashes(tmp_path).known(tmp_path / "nothing.mp4")


WRITER = """
import sys
from luve_lightning.data import hashes as file_hashes
file_hashes._SETTLED_NS = 0
hashes = file_hashes.FileHashes(sys.argv[1])
for path in sys.argv[2:]:
    hashes.digest(path)
"""


def test_processes_append_whole_lines(tmp_path: Path) -> None:
    files = [settled_file(tmp_path / f"{i}.mp4", bytes([i])) for i in range(120)]
    shares = [files[:80], files[40:], files[::2]]
    store = tmp_path / "store"
    running = [subprocess.Popen([sys.executable, "-c", WRITER, store, *share]) for share in shares]
    assert [process.wait(150) for process in running] == [0, 0, 0]
    hashes = FileHashes(store)
    assert all(hashes.known(file) == hashlib.sha256(bytes([i])).hexdigest() for i, file in enumerate(files))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("folder_is_there", [True, False])
def test_where_nothing_may_be_written_hashes_are_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, folder_is_there: bool
) -> None:
    store = tmp_path / "store"
    one, two = settled_file(tmp_path / "1", b"1"), settled_file(tmp_path / "2", b"2")
    if folder_is_there:
        FileHashes(store).digest(one)
    forbid_writing(monkeypatch, store, number)
    hashes = FileHashes(store)
    three = settled_file(tmp_path / "3", b"3")
    with pytest.warns(UserWarning, match=f"{store}: cannot be written .*kept in memory") as told:
        digests = [hashes.digest(path) for path in (one, two, three)]
    assert digests == [hashlib.sha256(content).hexdigest() for content in (b"1", b"2", b"3")]
    assert len(told) == 1
    assert hashes.known(two) == hashlib.sha256(b"2").hexdigest()
    assert FileHashes(store).known(two) is None


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000 + "]" * 100_000,
        '{"path": {}, "stamp": [1, 2, 3], "sha256": "' + "a" * 64 + '"}',
        '{"path": "PATH", "stamp": 5, "sha256": "' + "a" * 64 + '"}',
        '{"path": "PATH", "stamp": STAMP, "sha256": 5}',
        '{"path": "PATH", "stamp": STAMP, "sha256": "../../etc"}',
        "5",
        "null",
        "\xff\xfe",
    ],
)
def test_strange_lines_are_passed_over(tmp_path: Path, line: str) -> None:
    one, two = settled_file(tmp_path / "1", b"1"), settled_file(tmp_path / "2", b"2")
    FileHashes(tmp_path).digest(two)
    line = line.replace("PATH", str(one)).replace("STAMP", str(list(file_hashes.stamp(one))))
    with (tmp_path / "file_hashes.jsonl").open("a", encoding="latin-1") as stream:
        stream.write(line + "\n")
    hashes = FileHashes(tmp_path)
    assert hashes.known(two) == hashlib.sha256(b"2").hexdigest()
    assert hashes.known(one) is None
    assert hashes.digest(one) == hashlib.sha256(b"1").hexdigest()


def test_links_in_a_circle_and_long_names_are_os_errors(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for path in (tmp_path / "a", tmp_path / ("x" * 300)):
        for look in (FileHashes(tmp_path).digest, FileHashes(tmp_path).known):
            with pytest.raises(OSError, match=r"symbolic links|too long"):
                look(path)
