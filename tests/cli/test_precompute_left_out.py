"""Clips that `luve precompute` leaves out: unreadable, too short, or not chosen."""

from __future__ import annotations

from pathlib import Path

import pytest

from luve_lightning.data.video_index import VideoIndex
from tests.helpers.precomputing import find, on_world, recipe, summary
from tests.helpers.small_world import add_row, change_rows, write_world


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return write_world(tmp_path, 3)


@pytest.fixture
def luve(capsys: pytest.CaptureFixture[str], world: Path, tiny_backbone: Path, tmp_path: Path):
    return on_world(capsys, world, tiny_backbone, tmp_path)


@pytest.mark.slow
def test_bad_clips_are_set_aside_and_the_run_goes_on(luve, world: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    bad = VideoIndex.from_csv(world).entries[1]
    bad.path.write_bytes(b"broken")
    outcome = luve(max_bad_fraction=0.4)
    assert summary(outcome) == (8, 0, 1)
    assert f"listed in {tmp_path}/store/quarantine/48x48-9-from-0-by-1.jsonl" in outcome.out
    assert summary(luve(max_bad_fraction=0.4)) == (0, 8, 1)
    lookup = find(tmp_path / "store", world, recipe(tiny_backbone))
    assert len(lookup.pairs) == 2
    assert [clip_id for clip_id, _ in lookup.dropped] == [bad.clip_id]


def test_too_many_bad_clips_stop_the_run_with_the_list(luve, world: Path) -> None:
    bad = VideoIndex.from_csv(world).entries[1]
    bad.path.write_bytes(b"broken")
    outcome = luve(max_bad_fraction=0)
    assert outcome.code == 2
    (line,) = outcome.error_lines
    assert "1 of 3 clips cannot be read" in line
    assert str(bad.path) in line


@pytest.mark.slow
def test_rows_left_out_are_told_and_clips_can_be_chosen(luve, world: Path) -> None:
    add_row(world, clip_id="a boat", url="x")
    add_row(world, clip_id="gone", url="y")
    (world.parent / "clips" / "gone.MOV").touch()
    add_row(world, clip_id="gone2", url="y")
    outcome = luve()
    assert summary(outcome) == (12, 0, 0)
    told = outcome.out.splitlines()[:3]
    clips = world.parent / "clips"
    assert told == [
        f"{world}: 3 clips of 3 source videos, 3 rows dropped",
        f"       2  file missing (first: gone {clips}/gone.mp4 (gone.MOV is there))",
        "       1  bad clip_id (first: a boat 'a boat', letters, digits, '.', '_' and '-' expected)",
    ]
    # What is chosen is no part of a latent's address.
    change_rows(world, fps="60", frame_height="40")
    outcome = luve(**{"keep.fps_range": "[1, 30]"})
    assert summary(outcome) == (0, 8, 0)
    assert "1  frame rate not wanted (first: " in outcome.out
    assert summary(luve(**{"keep.min_height": 48})) == (0, 8, 0)
    outcome = luve(**{"keep.min_frames": 10})
    assert (outcome.code, "no clip can be used: 3 too few frames" in outcome.error_lines[0]) == (2, True)
    outcome = luve(**{"keep.fps_range": "[30, 1]"})
    assert (outcome.code, "fps_range" in outcome.error_lines[0]) == (2, True)


@pytest.mark.slow
def test_short_clips_are_told_and_do_not_count_as_unreadable(
    luve, world: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    change_rows(world, total_frames="4")
    outcome = luve(max_bad_fraction=0)
    assert summary(outcome) == (8, 0, 0)
    short = VideoIndex.from_csv(world).entries[0]
    assert f"  too short      1, first {short.path}: 4 frames, expected at least 9" in outcome.out.splitlines()
    lookup = find(tmp_path / "store", world, recipe(tiny_backbone))
    assert lookup.dropped == [(short.clip_id, "4 frames, expected at least 9")]
    outcome = luve(start=90)
    assert outcome.code == 2
    assert "all of 3 clips are too short, first " in outcome.error_lines[0]


@pytest.mark.slow
def test_one_bad_clip_does_not_stop_a_small_data_set(luve, world: Path) -> None:
    VideoIndex.from_csv(world).entries[1].path.write_bytes(b"broken")
    assert summary(luve()) == (8, 0, 1)
