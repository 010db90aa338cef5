"""The quarantine, alone and under real workers that read real files."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from luve_lightning.data.clip_container import ClipError
from luve_lightning.data.clips import read_clip
from luve_lightning.data.quarantine import Quarantine, TooManyBadClips, first_readable
from tests.helpers.unwritable import forbid_writing
from tests.helpers.video_files import numbers_of, write_sound, write_video

FRAMES = 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve clips, of which six cannot be read, each for a reason of its own."""
    good = write_video(tmp_path, count=FRAMES, name="good")
    for number in range(12):
        shutil.copy(good, tmp_path / f"{number:02d}.mp4")
    (tmp_path / "01.mp4").write_bytes(b"\x00\x17" * 4000)
    os.truncate(tmp_path / "03.mp4", good.stat().st_size // 2)
    os.truncate(tmp_path / "04.mp4", 0)
    (tmp_path / "07.mp4").unlink()
    write_video(tmp_path, count=FRAMES - 1, name="08")
    write_sound(tmp_path / "11.mp4")
    return tmp_path


BAD = {
    "01": "cannot be read|no video stream",
    "03": "cannot be read|cut short",
    "04": "is empty",
    "07": "is missing",
    "08": "too short: frames 0 to 5 asked for, it has 5",
    "11": "no video stream",
}


class Survivors(Dataset[tuple[int, torch.Tensor]]):
    """All clips of a folder by number, or the next readable ones instead."""

    def __init__(self, folder: Path, quarantine: Quarantine) -> None:
        self.folder, self.quarantine = folder, quarantine

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return first_readable(index, len(self), self._read, self.quarantine)

    def _read(self, index: int) -> torch.Tensor:
        return torch.from_numpy(read_clip(self.folder / f"{index:02d}.mp4", 0, FRAMES))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_survive_bad_files(workers: int, folder: Path) -> None:
    listed = folder / "runs" / "quarantine.jsonl"
    dataset = Survivors(folder, Quarantine(listed, 0.5, 12))
    loader = DataLoader(dataset, batch_size=4, num_workers=workers, timeout=150 if workers else 0)
    for _ in range(2):  # the second epoch lists nothing twice
        batches = list(loader)
        assert [len(clips) for _, clips in batches] == [4, 4, 4]
        # Each bad one is replaced by the next that can be read, and after the last comes the first.
        assert torch.cat([indices for indices, _ in batches]).tolist() == [0, 2, 2, 5, 5, 5, 6, 9, 9, 9, 10, 0]
        for _, clips in batches:
            assert all(numbers_of(clip.numpy()) == list(range(FRAMES)) for clip in clips)
    lines = lines_of(listed)
    assert sorted(line["clip_id"] for line in lines) == sorted(BAD)
    for line in lines:
        assert line["path"] == str(folder / f"{line['clip_id']}.mp4")
        assert str(line["time"]).endswith("+00:00")
        with pytest.raises(RuntimeError, match=BAD[str(line["clip_id"])]):
            raise RuntimeError(line["reason"])


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_clips_stop_the_run_with_a_list(workers: int, folder: Path) -> None:
    dataset = Survivors(folder, Quarantine(folder / "quarantine.jsonl", 0.45, 12))  # five may be bad, not six
    loader = DataLoader(dataset, batch_size=4, num_workers=workers, timeout=150 if workers else 0)
    batches = iter(loader)
    with pytest.raises(TooManyBadClips) as error:
        list(batches)
    if workers:  # or torch waits five seconds for each when it tidies up
        batches._shutdown_workers()  # type: ignore[attr-defined]
    (line,) = str(error.value).splitlines()
    parts = line.removeprefix("6 of 12 clips cannot be read (50.0%, 45.0% allowed): ").split("; ")
    assert len([part for part in parts if part.startswith(f"{folder}/")]) == 5
    listed = f"listed in {folder / 'quarantine.jsonl'}"
    assert parts[5:] == [f"and 1 more ({listed}", "delete it to start the count again)"]
    assert "Traceback" not in line


def test_the_share_allowed_is_allowed(tmp_path: Path) -> None:
    quarantine = Quarantine(None, 0.5, 4)
    quarantine.add(ClipError(tmp_path / "a.mp4", "is missing"))
    quarantine.add(ClipError(tmp_path / "b.mp4", "is missing"))
    quarantine.add(ClipError(tmp_path / "b.mp4", "is missing"))  # again: still two
    with pytest.raises(TooManyBadClips, match=r"3 of 4 clips cannot be read \(75\.0%, 50\.0% allowed\)"):
        quarantine.add(ClipError(tmp_path / "c.mp4", "is missing"))


def test_a_few_bad_clips_do_not_stop_a_small_data_set(tmp_path: Path) -> None:
    """One of 14 is more than 5 %."""
    quarantine = Quarantine(None, 0.05, 14)
    for name in "ab":
        quarantine.add(ClipError(tmp_path / f"{name}.mp4", "is missing"))
    with pytest.raises(TooManyBadClips, match=r"3 of 14 clips cannot be read \(21\.4%, 2 clips allowed\): \S"):
        quarantine.add(ClipError(tmp_path / "c.mp4", "is missing"))
    pair = Quarantine(None, 0.05, 2)  # of which one must be left
    pair.add(ClipError(tmp_path / "a.mp4", "is missing"))
    with pytest.raises(TooManyBadClips, match="2 of 2"):
        pair.add(ClipError(tmp_path / "b.mp4", "is missing"))


def test_none_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(TooManyBadClips, match="1 of 100 clips"):
        Quarantine(None, 0, 100).add(ClipError(tmp_path / "a.mp4", "is missing"))


def test_all_bad_does_not_loop_for_ever(tmp_path: Path) -> None:
    def read(index: int) -> int:
        raise ClipError(tmp_path / f"{index}.mp4", "is missing")

    with pytest.raises(TooManyBadClips, match=r"no clip can be read: 3 of 3"):
        first_readable(2, 3, read, Quarantine(None, 1.0, 3))


def test_other_errors_are_not_swallowed() -> None:
    def read(index: int) -> int:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        first_readable(0, 3, read, Quarantine(None, 1.0, 3))


def add_many(path: Path, barrier: Callable[[], object], shift: int) -> None:
    quarantine = Quarantine(path, 1.0, 1000)
    barrier()
    for number in range(60):
        clip = path.parent / f"{(number + shift) % 60}.mp4"
        quarantine.add(ClipError(clip, "is damaged: " + "x" * 5000))  # longer than a pipe's atomic write


def test_processes_list_each_clip_once_in_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    workers = [context.Process(target=add_many, args=(path, barrier.wait, 15 * i)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(150)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert sorted(str(line["clip_id"]) for line in lines_of(path)) == sorted(str(i) for i in range(60))
    assert len(Quarantine(path, 1.0, 1000).bad()) == 60


def test_processes_count_together(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    one, other = Quarantine(path, 0.02, 100), Quarantine(path, 0.02, 100)
    one.add(ClipError(tmp_path / "a.mp4", "is missing"))
    other.add(ClipError(tmp_path / "b.mp4", "is missing"))
    with pytest.raises(TooManyBadClips, match="3 of 100"):
        one.add(ClipError(tmp_path / "c.mp4", "is missing"))


def test_a_line_cut_off_by_a_kill_costs_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path, 1.0, 10).add(ClipError(tmp_path / "a.mp4", "is missing"))
    with path.open("a") as file:
        file.write('{"clip_id": "b", "pa')
    again = Quarantine(path, 1.0, 10)
    again.add(ClipError(tmp_path / "c.mp4", "is missing"))
    assert [clip.clip_id for clip in again.bad()] == ["a", "c"]
    assert [clip.clip_id for clip in Quarantine(path, 1.0, 10).bad()] == ["a", "c"]


def test_a_replaced_clip_no_longer_counts(tmp_path: Path) -> None:
    path, clip = tmp_path / "quarantine.jsonl", tmp_path / "a.mp4"
    clip.touch()
    Quarantine(path, 1.0, 10).add(ClipError(clip, "is empty (0 bytes)"))
    assert [bad.reason for bad in Quarantine(path, 1.0, 10).bad()] == ["is empty (0 bytes)"]
    write_video(tmp_path, count=2, name="a")
    resumed = Quarantine(path, 0.1, 10)
    assert resumed.bad() == []
    resumed.add(ClipError(clip, "is damaged"))  # one is allowed, and the old line is not counted
    assert [bad.reason for bad in resumed.bad()] == ["is damaged"]


def test_a_deleted_list_starts_again(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, 1.0, 10)
    quarantine.add(ClipError(tmp_path / "a.mp4", "is missing"))
    path.unlink()
    quarantine.add(ClipError(tmp_path / "b.mp4", "is missing"))
    assert [clip.clip_id for clip in quarantine.bad()] == ["b"]


@pytest.mark.parametrize(("share", "total"), [(-0.1, 5), (1.1, 5), (float("nan"), 5), (0.5, 0)])
def test_impossible_values_are_named(share: float, total: int) -> None:
    with pytest.raises(ValueError, match=r"(max_bad_fraction|total): expected"):
        Quarantine(None, share, total)


def test_clips_of_another_index_do_not_count(tmp_path: Path) -> None:
    """Runs that share a store share its list: of other splits, of other people's clips."""
    path, clips = tmp_path / "quarantine.jsonl", [tmp_path / f"{name}.mp4" for name in "abcd"]
    for clip in clips[:3]:
        Quarantine(path, 1.0, 4).add(ClipError(clip, "is missing"))
    own = Quarantine(path, 0.5, 2, clips[2:])
    own.add(ClipError(clips[2], "is missing"))
    assert [clip.clip_id for clip in own.bad()] == ["c"]
    assert own.describe().startswith("1 of 2 clips cannot be read (50.0%, 50.0% allowed)")
    with pytest.raises(TooManyBadClips, match="2 of 2 clips"):
        own.add(ClipError(clips[3], "is missing"))
    assert own.too_many()


def test_a_list_that_may_not_be_written_goes_on_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store" / "quarantine.jsonl"
    for name in "ac":
        Quarantine(path, 1.0, 10).add(ClipError(tmp_path / f"{name}.mp4", "is missing"))
    forbid_writing(monkeypatch, path.parent, errno.EROFS)
    quarantine = Quarantine(path, 0.1, 10)
    quarantine.add(ClipError(tmp_path / "a.mp4", "is missing"))  # listed: nothing is to be written
    with pytest.warns(UserWarning, match="kept in memory"), pytest.raises(TooManyBadClips, match="3 of 10"):
        quarantine.add(ClipError(tmp_path / "b.mp4", "is missing"))
    assert [clip.clip_id for clip in quarantine.bad()] == ["a", "c", "b"]
    assert [clip.clip_id for clip in Quarantine(path, 1.0, 10).bad()] == ["a", "c"]


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        "[]",
        "7",
        '{"clip_id": "a"}',
        '{"clip_id": 1, "path": 2, "reason": 3, "time": 4, "size": 5, "changed_ns": 6}',
        '{"clip_id": "a", "path": "a\\u0000.mp4", "reason": "r", "time": "", "size": null, "changed_ns": null}',
    ],
)
def test_strange_lines_are_passed_over(tmp_path: Path, line: str) -> None:
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path, 1.0, 10).add(ClipError(tmp_path / "a.mp4", "is missing"))
    with path.open("a") as file:
        file.write(line + "\n")
    assert [clip.clip_id for clip in Quarantine(path, 1.0, 10).bad()] == ["a"]
