"""Scoring clips: which of them a process rates, and what the scorer is shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luve_lightning.data.clip_container import Frames
from luve_lightning.data.clip_scores import FrameChoice, ScoreRow, ScoreSettings, Shard, parse_shard, read_rows
from luve_lightning.data.clips import read_clip
from luve_lightning.data.hashes import stamp
from luve_lightning.data.quarantine import Quarantine
from luve_lightning.data.scorers import ClipJob, FrameReader, Scorer, read_ahead, score_clips
from luve_lightning.data.video_index import ClipEntry
from tests.helpers.small_world import write_clip


@given(clips=st.integers(0, 50), count=st.integers(1, 9))
def test_each_clip_is_in_one_share_and_shares_are_even(clips: int, count: int) -> None:
    shares = [range(clips)[i::count] for i in range(count)]
    assert sorted(clip for share in shares for clip in share) == list(range(clips))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert len({Shard(i, count).file_name for i in range(count)}) == count


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        (None, {}, Shard(0, 1)),
        ("2/5", {}, Shard(2, 5)),
        ("0/2", {"RANK": "0", "WORLD_SIZE": "1"}, Shard(0, 2)),
        (None, {"RANK": "3", "WORLD_SIZE": "4"}, Shard(3, 4)),
    ],
)
def test_where_it_comes_from(text: str | None, environment: dict[str, str], expected: Shard) -> None:
    assert parse_shard(text, environment) == expected


@pytest.mark.parametrize("text", ["4/4", "1", "-1/2", "a/b", "0/0", "1/2/3"])
def test_a_share_of_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="shard: expected i/n"):
        parse_shard(text, {})


def test_both_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="torchrun's 4 processes share the clips by themselves"):
        parse_shard("0/2", {"RANK": "0", "WORLD_SIZE": "4"})


ROW = ScoreRow("clip", "0" * 64, "1" * 64, ScoreSettings("s", "1", "Style", "some"))


def job(path: Path, total_frames: int = 9) -> ClipJob:
    return ClipJob(ClipEntry("clip", path, "url", 16, total_frames, 48, 48, {}), ROW, stamp(path))


@pytest.mark.slow
@given(count=st.integers(1, 40), total=st.integers(1, 600))
def test_equally_spaced_frames_lie_inside_the_clip(count: int, total: int) -> None:
    chosen = FrameChoice(count).of(total)
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) == min(count, total)
    assert chosen[0] >= 0
    assert chosen[-1] < total
    gaps = np.diff([-1 - chosen[0], *chosen, 2 * total - 1 - chosen[-1]])  # mirrored at both ends
    assert gaps.max() - gaps.min() <= 2


def test_examples() -> None:
    assert FrameChoice(4).of(33) == (4, 12, 20, 28)
    assert FrameChoice(1).of(33) == (16,)
    assert FrameChoice(indices=(0, 8)).of(33) == (0, 8)
    assert str(FrameChoice(4)) != str(FrameChoice(3)) != str(FrameChoice(indices=(3,)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"count": 0}, "frames: "), ({"indices": ()}, "indices: "), ({"indices": (0, -1)}, "indices: ")],
)
def test_nonsense_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrameChoice(**arguments)  # type: ignore[arg-type]


def test_a_scorer_of_clips_sees_one_at_a_time(tmp_path: Path) -> None:
    clips = [write_clip(tmp_path / f"{seed}.mp4", seed) for seed in range(3)]
    entries = [ClipEntry(path.stem, path, "url", 16, 9, 48, 48, {"Style": "a style"}) for path in clips]
    seen: dict[bool, list[Frames]] = {False: [], True: []}

    class Counting(Scorer):
        name, version = "counting", "1"

        def score(self, frames: Frames, captions: Sequence[str]) -> list[float]:
            seen[self.of_clips].append(frames)
            return [float(len(frames))] * len(captions)

    for of_clips in (False, True):
        scorer = Counting()
        scorer.of_clips = of_clips
        folder = tmp_path / str(of_clips)
        quarantine = Quarantine(None, 0.5, 3)
        score_clips(entries, scorer, folder, "Style", FrameChoice(4), Shard(), 3, 0, quarantine)
    assert [len(frames) for frames in seen[False]] == [12]
    assert [len(frames) for frames in seen[True]] == [4, 4, 4]
    for path, frames in zip(clips, seen[True], strict=True):
        assert np.array_equal(frames, read_clip(path, 0, 9)[list(FrameChoice(4).of(9))])
    assert {row.score for row in read_rows(tmp_path / "True")} == {4.0}


def test_it_reads_exactly_these_frames(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 0)
    for indices in ((1, 4, 8), (0, 1, 2, 5, 6), (6, 2)):
        got = FrameReader(FrameChoice(indices=indices))(job(clip))
        assert got.frames is not None
        assert np.array_equal(got.frames, read_clip(clip, 0, 9)[list(indices)])
        assert got.indices == indices


def test_what_cannot_be_read_has_a_reason(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 0)
    short = FrameReader(FrameChoice(indices=(9,)))(job(clip))
    assert (short.frames, short.reason) == (None, "too short: frames 9 to 9 asked for, it has 9")
    stale = job(clip)
    write_clip(clip, 1)
    assert FrameReader(FrameChoice(2))(stale).reason == "changed while it was read"
    clip.write_bytes(b"broken")
    assert FrameReader(FrameChoice(2))(job(clip)).reason
    gone = job(clip)
    clip.unlink()
    assert FrameReader(FrameChoice(2))(gone).reason == "is missing"


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_threads_keep_the_order_and_do_not_run_far_ahead(tmp_path: Path, threads: int) -> None:
    clips = [write_clip(tmp_path / f"{seed}.mp4", seed, frames=2) for seed in range(7)]
    started = []

    def jobs():  # type: ignore[no-untyped-def]
        for clip in clips:
            started.append(clip)
            yield job(clip, 2)

    taken = []
    for item in read_ahead(FrameReader(FrameChoice(1)), jobs(), threads, batch_size=2):
        taken.append(item.job.entry.path)
        assert len(started) <= len(taken) + 3
    assert taken == clips
