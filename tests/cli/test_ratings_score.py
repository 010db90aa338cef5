"""`luve score` in this process: what it writes, skips, refuses and prints."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from luve_lightning.data.clip_scores import ScoreRow, read_rows, write_rows
from luve_lightning.data.clips import read_clip
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.video_index import VideoIndex
from tests.helpers.run_luve import Outcome, run_luve
from tests.helpers.scoring import captioned_world, recorded, set_captions
from tests.helpers.small_world import add_row, change_rows, write_clip
from tests.helpers.video_files import set_matrix

CLIPS = 5


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return captioned_world(tmp_path, CLIPS)


@pytest.fixture
def luve(capsys: pytest.CaptureFixture[str], world: Path, tmp_path: Path):
    """Runs the verb on the small world; keyword arguments replace or add options."""

    def run(**options: object) -> Outcome:
        given: dict[str, object] = {"index": world, "output": tmp_path / "scores", "batch_size": 2, "frames": 3}
        given |= {"scorer": "tests.helpers.scorers.Recording", "scorer.log": tmp_path / "log"} | options
        return run_luve(capsys, "score", *(f"--{name}={value}" for name, value in given.items()))

    return run


def summary(outcome: Outcome) -> tuple[int, ...]:
    """Scored, already there, unreadable."""
    return outcome.numbers(r"  scored +(\d+) clips?", r"  already there +(\d+)", r"  unreadable +(\d+)")


def by_clip(folder: Path) -> dict[str, ScoreRow]:
    return {row.clip_id: row for row in read_rows(folder)}


def ids(world: Path) -> list[str]:
    return [entry.clip_id for entry in VideoIndex.from_csv(world).entries]


def test_each_row_says_what_was_scored_and_how(luve, world: Path, tmp_path: Path) -> None:
    assert summary(luve()) == (CLIPS, 0, 0)
    rows = by_clip(tmp_path / "scores")
    for entry in VideoIndex.from_csv(world).entries:
        row = rows[entry.clip_id]
        assert row.clip_sha256 == hashlib.sha256(entry.path.read_bytes()).hexdigest()
        assert row.caption_sha256 == hashlib.sha256(entry.clip_id.encode()).hexdigest()
        assert (row.settings.scorer, row.settings.scorer_version) == ("recording", "1")
        assert row.settings.caption_column == "Summarized Description"
        assert row.frame_indices == (1, 4, 7)
        reds = read_clip(entry.path, 0, 9)[[1, 4, 7], ..., 0].mean((1, 2))
        assert row.frame_scores == pytest.approx(tuple(reds))
        assert row.score == pytest.approx(np.mean(reds))
        assert row.error is None
    assert recorded(tmp_path / "log") == [ids(world)[i : i + 2] for i in range(0, CLIPS, 2)]


def test_the_file_is_plain_parquet(luve, tmp_path: Path) -> None:
    luve()
    (file,) = (tmp_path / "scores").glob("*.parquet")
    table = pq.read_table(file)
    assert set(table.column_names) == {
        *("clip_id", "clip_sha256", "scorer", "scorer_version", "frame_choice", "frame_indices", "frame_scores"),
        *("score", "caption_column", "caption_sha256", "error"),
    }
    assert table.num_rows == CLIPS


@pytest.mark.parametrize("threads", [0, 2])
def test_what_has_a_score_is_not_scored_again(luve, world: Path, tmp_path: Path, threads: int) -> None:
    luve(num_workers=threads)
    (file,) = (tmp_path / "scores").glob("*.parquet")
    before = file.read_bytes()
    assert summary(luve(num_workers=threads)) == (0, CLIPS, 0)
    assert file.read_bytes() == before
    assert len(recorded(tmp_path / "log")) == 3


def test_a_changed_clip_and_a_changed_caption_are_scored_again(luve, world: Path, tmp_path: Path) -> None:
    luve()
    first, second, *others = ids(world)
    old = by_clip(tmp_path / "scores")
    write_clip(world.parent / "clips" / f"{first}.mp4", seed=99)
    set_captions(world, {second: "changed"})
    assert summary(luve()) == (2, CLIPS - 2, 0)
    new = by_clip(tmp_path / "scores")
    assert new[first].clip_sha256 != old[first].clip_sha256
    assert new[first].score != old[first].score
    assert new[second].caption_sha256 != old[second].caption_sha256
    assert all(new[clip] == old[clip] for clip in others)


def test_unreadable_clips_are_named_and_tried_again(luve, world: Path, tmp_path: Path) -> None:
    bad = ids(world)[1]
    path = world.parent / "clips" / f"{bad}.mp4"
    path.write_bytes(b"broken")
    outcome = luve(max_bad_fraction=0.5)
    assert summary(outcome) == (CLIPS - 1, 0, 1)
    row = by_clip(tmp_path / "scores")[bad]
    assert row.score is None
    assert row.frame_scores == ()
    assert row.error
    assert f"{bad}: {row.error}" in outcome.out
    assert bad in (tmp_path / "scores" / "unreadable.jsonl").read_text()
    write_clip(path, 1)
    assert summary(luve(max_bad_fraction=0.5)) == (1, CLIPS - 1, 0)
    assert by_clip(tmp_path / "scores")[bad].error is None


def test_too_many_unreadable_clips_stop_the_run_but_keep_its_scores(luve, world: Path, tmp_path: Path) -> None:
    bad = ids(world)[3]
    (world.parent / "clips" / f"{bad}.mp4").write_bytes(b"broken")
    outcome = luve(max_bad_fraction=0)
    assert outcome.code == 2
    (line,) = outcome.error_lines
    assert "1 of 5 clips cannot be read" in line
    assert bad in line
    assert sum(row.score is not None for row in read_rows(tmp_path / "scores")) == 3


def test_shards_together_equal_one_run(luve, world: Path, tmp_path: Path) -> None:
    luve()
    parts = tmp_path / "parts"
    assert summary(luve(output=parts, shard="0/2")) == (3, 0, 0)
    assert summary(luve(output=parts, shard="1/2")) == (2, 0, 0)
    assert by_clip(parts) == by_clip(tmp_path / "scores")
    assert summary(luve(output=parts)) == (0, CLIPS, 0), "another number of shards finds everything"
    assert summary(luve(output=parts, shard="2/3")) == (0, 1, 0)


def test_clips_of_different_sizes_get_their_own_scores(luve, world: Path, tmp_path: Path) -> None:
    wide = ids(world)[2]
    write_clip(world.parent / "clips" / f"{wide}.mp4", seed=7, height=32, width=64)
    assert summary(luve(batch_size=5)) == (CLIPS, 0, 0)
    for entry in VideoIndex.from_csv(world).entries:
        expected = read_clip(entry.path, 0, 9)[[1, 4, 7], ..., 0].mean()
        assert by_clip(tmp_path / "scores")[entry.clip_id].score == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"scorer.revision": "2"}, "recording (2; "),
        ({"frames": 2}, "2 frames equally spaced"),
        ({"indices": "[0, 3]"}, "frames 0, 3"),
        ({"caption": "Style"}, "; Style)"),
    ],
)
def test_other_settings_are_not_mixed_in(luve, tmp_path: Path, options: dict[str, object], difference: str) -> None:
    luve()
    before = by_clip(tmp_path / "scores")
    outcome = luve(**options)
    assert outcome.code == 2
    (line,) = outcome.error_lines
    assert "holds scores by recording (1; 3 frames equally spaced; Summarized Description), not by" in line
    assert difference in line
    assert by_clip(tmp_path / "scores") == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption": "Caption"}, "caption: expected one of Brief Description, "),
        ({"frames": 0}, "frames: expected at least 1, got 0"),
        ({"indices": "[-1]"}, "indices: expected one or more frame numbers >= 0, got [-1]"),
        ({"shard": "2/2"}, "shard: expected i/n with 0 <= i < n, got 2/2"),
        ({"batch_size": 0}, "expected batch_size >= 1"),
        ({"index": "nothing.csv"}, "nothing.csv: no such CSV"),
        ({"scorer": "luve_lightning.data.scorers.Sharpness"}, "scorer"),
    ],
)
def test_mistakes_are_one_line(luve, options: dict[str, object], message: str) -> None:
    outcome = luve(**options)
    assert outcome.code == 2
    (line,) = outcome.error_lines
    assert message in line


def test_a_scorer_of_takes_wants_neighbours_and_clips_long_enough(
    capsys: pytest.CaptureFixture[str], world: Path, tmp_path: Path
) -> None:
    def luve(**options: object) -> Outcome:
        given = {"index": world, "output": tmp_path / "scores", "max_bad_fraction": 0.5, **options}
        words = [f"--{name}={value}" for name, value in given.items()]
        return run_luve(capsys, "score", "--scorer=luve_lightning.data.scorers.TakeQuality", *words)

    for options, message in (
        ({}, "frames: take-quality rates frames that follow one another, and 4 frames equally spaced of the 9 of "),
        ({"indices": "[0, 2]"}, "indices: take-quality rates frames that follow one another, and frames 0, 2 of the 9"),
    ):
        (line,) = luve(**options).error_lines
        assert message in line
        assert "expected --frames 9, all of the longest clip's" in line
    small = VideoIndex.from_csv(world).entries[0]
    write_clip(small.path, 1, height=24)
    change_rows(world, clip_id=small.clip_id, frame_height="24")
    outcome = luve(frames=9)
    assert summary(outcome) == (CLIPS - 1, 0, 1), "one bad clip does not stop the others"
    assert (
        by_clip(tmp_path / "scores")[small.clip_id].error == "9 frames of 48x24, expected 3 or more of at least 32x32"
    )


def test_a_score_that_is_no_number_is_refused(luve, tmp_path: Path) -> None:
    outcome = luve(**{"scorer": "tests.helpers.scorers.NotANumber", "scorer.log": tmp_path / "log"})
    assert outcome.code == 2
    (line,) = outcome.error_lines
    assert "recording gave" in line
    assert not read_rows(tmp_path / "scores")


@pytest.mark.slow
def test_rows_left_out_are_told_and_clips_can_be_chosen(luve, world: Path, tmp_path: Path) -> None:
    add_row(world, clip_id="a boat", url="x")
    change_rows(world, fps="60")
    outcome = luve(**{"keep.fps_range": "[1, 30]"})
    assert summary(outcome) == (CLIPS - 1, 0, 0)
    assert f"{world}: {CLIPS - 1} clips" in outcome.out.splitlines()[0]
    assert "1  bad clip_id (first: a boat 'a boat'" in outcome.out
    assert "1  frame rate not wanted (first: " in outcome.out


def test_clips_that_are_not_shown_as_stored_get_scores_of_their_own(luve, world: Path, tmp_path: Path) -> None:
    first, second, *_ = VideoIndex.from_csv(world).entries
    set_matrix(first.path, 1, 1, -1, 1)
    set_matrix(second.path, -1, 0, 0, 1)
    assert summary(luve(max_bad_fraction=0.5)) == (CLIPS - 1, 0, 1)
    rows = by_clip(tmp_path / "scores")
    assert "is shown turned or sheared" in str(rows[first.clip_id].error)
    assert rows[second.clip_id].clip_sha256 == ClipHashes(tmp_path).digest(second.path)
    # As it was scored when it was read otherwise: not taken for this one.
    old = hashlib.sha256(second.path.read_bytes()).hexdigest()
    part = next((tmp_path / "scores").glob("*.parquet"))
    write_rows(part, [replace(row, clip_sha256=old) if row.clip_id == second.clip_id else row for row in rows.values()])
    assert summary(luve(max_bad_fraction=0.5)) == (1, CLIPS - 2, 1)
