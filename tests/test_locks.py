"""Files of lines that several processes append to, and work that they share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from luve_lightning.locks import JsonLines, remove_locked, share_work, try_lock


def test_what_one_appends_another_reads_once(tmp_path: Path) -> None:
    ours, theirs = JsonLines(tmp_path / "a" / "lines"), JsonLines(tmp_path / "a" / "lines")
    assert ours.new() == []
    ours.append({"name": "ä\ud800\n", "n": 1})
    theirs.append({"n": 2})
    assert ours.new() == theirs.new() == [{"name": "ä\ud800\n", "n": 1}, {"n": 2}]
    assert ours.new() == []
    ours.append({"n": 3}, unless=lambda: True)
    assert theirs.new() == []


def test_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "lines")
    lines.append({"n": 1})
    with lines.path.open("ab") as file:
        file.write(b'[1, 2]\n{"n": ')
    assert lines.new() == [{"n": 1}]
    lines.append({"n": 2})
    assert lines.new() == [{"n": 2}]


def test_an_emptied_file_is_read_from_its_beginning(tmp_path: Path) -> None:
    lines, restarts = JsonLines(tmp_path / "lines"), []
    for n in range(3):
        lines.append({"n": n})
    assert len(lines.new(lambda: restarts.append(1))) == 3
    lines.path.unlink()
    assert lines.new(lambda: restarts.append(1)) == []
    lines.append({"n": 9})
    assert lines.new(lambda: restarts.append(1)) == [{"n": 9}]
    assert restarts == [1]


def test_a_lock_is_of_the_file_that_is_there_now(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = try_lock(path)
    assert first is not None
    assert try_lock(path) is None
    path.rename(tmp_path / "moved")
    second = try_lock(path)
    assert second is not None
    assert not remove_locked(path, first)
    assert remove_locked(path, second)
    assert not path.exists()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_what_others_make_is_waited_for_and_made_if_they_give_up(size: int) -> None:
    there, told, batches, held = {"a"}, [], [], set()
    elsewhere = {"c": True, "d": False}  # whether its maker finishes

    @contextmanager
    def claim(item: str, *, wait: bool) -> Iterator[bool]:
        if item in elsewhere and not wait:
            yield False
            return
        if elsewhere.pop(item, False):
            assert not held  # whoever waits holds nothing that others could wait for
            there.add(item)
        held.add(item)
        yield item not in there
        held.remove(item)

    def make(batch: list[str]) -> None:
        assert held >= set(batch)
        batches.append(batch)
        there.update(batch)

    share_work("abcdef", there.__contains__, claim, make, size, told.append)
    assert there == set("abcdef")
    assert [item for batch in batches for item in batch] == ["b", "e", "f", "d"]
    assert max(map(len, batches)) == min(size, 3)
    assert told == ["a", "c"]
    assert not held
