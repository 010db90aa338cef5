"""What files hold, and that an unchanged one is looked into once."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from luve_lightning.cli import index_probes
from luve_lightning.cli.index_probes import PROBES, Probe, ProbeCache, find_probes, probe_file
from tests.helpers.dying_probe import die_at_four
from tests.helpers.small_world import write_clip
from tests.helpers.video_files import write_video
from tests.helpers.waiting import wait_for


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # The inode time cannot be set back, so the wait for a settled file is shortened instead.
    monkeypatch.setattr(index_probes, "_SETTLED_NS", 0)


@pytest.fixture
def looked_into(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The files that are looked into, in this process."""
    seen: list[Path] = []

    def here(paths: list[Path], processes: int) -> Iterator[tuple[Path, Probe, bool]]:
        for path in paths:
            seen.append(path)
            probe, lasting = index_probes._probe_one(path)
            yield path, probe, lasting

    monkeypatch.setattr(index_probes, "_probed", here)
    return seen


def find(paths: list[Path], root: Path, processes: int = 1) -> dict[str, Probe]:
    found = find_probes(paths, ProbeCache(root), processes, lambda count, known: None, lambda: None)
    return {path.name: probe for path, (probe, _) in found.items()}


def test_a_clip(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", 0, 12, 48, 64)
    assert probe_file(clip) == Probe(64, 48, 12, 16.0, False, 0.75)


def test_a_varying_frame_rate(tmp_path: Path) -> None:
    pts = [*range(20), *range(20, 60, 2)]
    probe = probe_file(write_video(tmp_path, count=40, pts=pts))
    assert probe.uneven
    assert probe.duration == pytest.approx(60 / 24, rel=0.05)
    assert not probe_file(write_video(tmp_path, count=40)).uneven


def broken_files(folder: Path) -> list[Path]:
    whole = write_clip(folder / "whole.mp4", 0).read_bytes()
    contents = {"empty.mp4": b"", "text.mp4": b"hello\n", "cut.mp4": whole[:900], "noise.mkv": os.urandom(4000)}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "nowhere.mp4").symlink_to("gone")
    (folder / "self.mp4").symlink_to("self.mp4")
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    return sorted(folder.iterdir())


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    files = broken_files(tmp_path / "clips")
    found = find(files, tmp_path)
    assert [path.name for path in files if not found[path.name].reason] == ["whole.mp4"]
    assert found["empty.mp4"].reason == "is empty (0 bytes)"
    assert found["pipe.mp4"].reason == "is not a file"
    assert found["nowhere.mp4"].reason.startswith("link to nothing: ")
    assert all(probe.reason.count("\n") == 0 for probe in found.values())
    # The file that is empty or is not one may be another one the next time, without its stamp telling.
    assert find(files, tmp_path) == found


def test_an_unchanged_file_is_looked_into_once(tmp_path: Path, looked_into: list[Path]) -> None:
    clips = [write_clip(tmp_path / f"{i}.mp4", i) for i in range(3)]
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"hello")
    found = find([*clips, bad], tmp_path)
    assert looked_into == [*clips, bad]
    assert find([*clips, bad], tmp_path) == found
    assert len(looked_into) == 4
    before = clips[1].stat().st_ctime_ns
    assert wait_for(lambda: (write_clip(clips[1], 7, 5), clips[1].stat().st_ctime_ns != before)[1])
    assert find([*clips, bad], tmp_path)["1.mp4"].frames == 5
    assert looked_into[4:] == [clips[1]]


def test_ten_thousand_files_are_looked_into_once(
    tmp_path: Path, looked_into: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, not timed: each is asked for its stamp once, and none is opened."""
    clip = write_clip(tmp_path / "a.mp4", 0)
    facts = clip.stat()
    assert find([clip], tmp_path)
    line = (tmp_path / PROBES).read_text()
    names = [f"folder {i % 100}/{i}.mp4" for i in range(10_000)]
    (tmp_path / PROBES).write_text("".join(line.replace("a.mp4", name) for name in names))
    asked: list[Path] = []
    monkeypatch.setattr(Path, "stat", lambda self, **_: (asked.append(self), facts)[1])
    paths = [tmp_path / name for name in names]
    assert len(find(paths, tmp_path)) == len(paths)
    assert [path for path in asked if path != tmp_path] == paths
    assert looked_into == [clip]


def test_the_folder_of_clips_and_cache_can_be_moved(tmp_path: Path, looked_into: list[Path]) -> None:
    clip = write_clip(tmp_path / "here" / "a.mp4", 0)
    found = find([clip], tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert find([tmp_path / "there" / "a.mp4"], tmp_path / "there") == found
    assert looked_into == [clip]


def test_what_another_version_refused_is_tried_again(
    tmp_path: Path, looked_into: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, bad = write_clip(tmp_path / "a.mp4", 0), tmp_path / "bad.mp4"
    bad.write_bytes(b"hello")
    find([clip, bad], tmp_path)
    monkeypatch.setattr(index_probes, "_readers", lambda: "PyAV 99")
    find([clip, bad], tmp_path)
    assert looked_into == [clip, bad, bad]


def test_a_cache_that_is_damaged_or_cannot_be_written(tmp_path: Path, looked_into: list[Path]) -> None:
    clip = write_clip(tmp_path / "a.mp4", 0)
    (tmp_path / PROBES).write_text('{"path": "a.mp4", "rules": 1}\n[1]\nnonsense\n{"path": "a.mp4", "sta')
    assert find([clip], tmp_path) == find([clip], tmp_path)
    assert looked_into == [clip]
    (tmp_path / PROBES).unlink()
    (tmp_path / PROBES).mkdir()
    with pytest.warns(UserWarning, match="is kept in memory"):
        assert find([clip], tmp_path)["a.mp4"].frames == 9


def test_a_file_that_has_just_changed_is_not_remembered(
    tmp_path: Path, looked_into: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_probes, "_SETTLED_NS", 10**18)
    clip = write_clip(tmp_path / "a.mp4", 0)
    assert find([clip], tmp_path) == find([clip], tmp_path)
    assert looked_into == [clip, clip]


def test_files_of_which_one_ends_the_process_that_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = [write_clip(tmp_path / f"{i}.mp4", i) for i in range(9)]
    monkeypatch.setattr(index_probes, "_probe_one", die_at_four)
    found = find(clips, tmp_path, processes=2)
    assert {name for name, probe in found.items() if probe.reason} == {"4.mp4"}
    assert found["4.mp4"].reason.startswith("ends the program that reads it: ")
    assert (tmp_path / PROBES).read_text().count("\n") == 8


def test_ctrl_c_keeps_what_was_found(tmp_path: Path) -> None:
    clips = [write_clip(tmp_path / f"{i}.mp4", i) for i in range(6)]
    done = []

    def interrupt() -> None:
        done.append(True)
        if len(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_probes(clips, ProbeCache(tmp_path), 1, lambda count, known: None, interrupt)
    assert (tmp_path / PROBES).read_text().count("\n") == 3
    counts = []
    find_probes(clips, ProbeCache(tmp_path), 2, lambda *count: counts.append(count), lambda: None)
    assert counts == [(3, 3)]


def test_bytes_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_clip(tmp_path / "a.mp4", 0)
    facts = index_probes.stamp_of(clip.stat())
    digest = ProbeCache(tmp_path).digest(clip, facts)
    assert digest == hashlib.sha256(clip.read_bytes()).hexdigest()
    monkeypatch.setattr(index_probes, "file_digest", None)
    again = ProbeCache(tmp_path)
    again.load()
    assert again.digest(clip, facts) == digest
    with pytest.raises(TypeError):
        again.digest(clip, (*facts[:2], facts[2] + 1))
