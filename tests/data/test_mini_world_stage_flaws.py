"""Flawed takes: how many, of what, and where; good ones are those of a world without."""

from __future__ import annotations

import csv
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from luve_lightning.cli.precompute import mini_world
from luve_lightning.data.mini_world import OtherWorldError, render_mini_world
from luve_lightning.data.mini_world.paint import paint_scene, paint_take
from luve_lightning.data.mini_world.stage import FLAWS, FlawedScene, combinations_of, draw_stage
from luve_lightning.data.video_index import VideoIndex

SMALL = {"train": 40, "val": 3, "test": 3, "frames": 5, "size": 32, "processes": 1}


@pytest.mark.parametrize("share", [0.1, 0.333, 0.5, 0.8])
def test_as_many_as_asked_are_flawed_evenly(share: float) -> None:
    clips = list(draw_stage("combinations", 0, "train", 1642, 33, 192, 16, share))
    flawed = [clip for clip in clips if isinstance(clip, FlawedScene)]
    assert len(flawed) == pytest.approx(1642 * share, abs=16)  # one of each photograph
    per_photograph = Counter(clip.url for clip in flawed).values()
    assert max(per_photograph) - min(per_photograph) <= 3
    times = Counter({clip.source: 0 for clip in clips}) + Counter(clip.source for clip in flawed)
    assert set(times.values()) <= {int(2 * share), int(2 * share) + 1}
    good = {clip.source for clip in clips} - {source for source, count in times.items() if count == 2}
    assert len(good) == len(combinations_of("combinations", "train")) or share > 0.5


def test_kinds_come_as_often_as_they_weigh_and_amounts_are_in_range() -> None:
    flawed = [c for c in draw_stage("combinations", 2, "train", 1642, 33, 192, 16, 0.9) if isinstance(c, FlawedScene)]
    weights = sum(weight for weight, *_ in FLAWS.values())
    kinds = Counter(clip.flaw for clip in flawed)
    for flaw, (weight, *ends) in FLAWS.items():
        assert kinds[flaw] == pytest.approx(len(flawed) * weight / weights, rel=0.3)
        assert all(min(ends) <= clip.amount <= max(ends) for clip in flawed if clip.flaw == flaw)


def test_good_takes_are_those_of_a_world_without_flaws_and_held_out_ones_are_good() -> None:
    plain = list(draw_stage("combinations", 0, "train", 60, 33, 192, 16))
    mixed = list(draw_stage("combinations", 0, "train", 60, 33, 192, 16, 0.333))
    assert [a for a, b in zip(plain, mixed, strict=True) if not isinstance(b, FlawedScene)] == [
        clip for clip in mixed if not isinstance(clip, FlawedScene)
    ]
    assert all(a.parts == b.parts and a.camera == b.camera for a, b in zip(plain, mixed, strict=True))
    assert len({clip.clip_id for clip in (*plain, *mixed)}) == 60 + sum(isinstance(c, FlawedScene) for c in mixed)
    assert list(draw_stage("combinations", 0, "train", 9, 33, 192, 16, 0.333)) == mixed[:9]
    for split in ("val", "test"):
        assert not any(isinstance(c, FlawedScene) for c in draw_stage("combinations", 0, split, 50, 5, 32, 16, 0.9))


@pytest.mark.parametrize("size", [32, 192])
def test_each_flaw_changes_the_frames_and_no_more_than_that(size: int) -> None:
    seen = set()
    for clip in draw_stage("combinations", 0, "train", 60, 5, size, 16, 0.9):
        if isinstance(clip, FlawedScene) and clip.flaw not in seen:
            seen.add(clip.flaw)
            frames, taken = paint_scene(clip), paint_take(clip)
            assert taken.shape == frames.shape
            assert taken.dtype == frames.dtype
            assert not taken.equal(frames)
            assert taken.equal(paint_take(clip))
    assert seen == set(FLAWS)


def test_the_index_says_which_clips_are_flawed_and_training_is_not_told(tmp_path: Path) -> None:
    world, again, plain = (tmp_path / name for name in ("world", "again", "plain"))
    render_mini_world(world, **SMALL, kind="combinations", flaws=0.333)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index = VideoIndex.open(world / "clips.csv")
    with (world / "clips.csv").open(newline="") as file:
        rows = {row["clip_id"]: row for row in csv.DictReader(file)}
    drawn = {c.clip_id: c for c in draw_stage("combinations", 0, "train", 40, 5, 32, 16, 0.333)}
    assert {i for i, row in rows.items() if row["flaw"]} == {i for i, c in drawn.items() if isinstance(c, FlawedScene)}
    for entry in index.split("train"):
        clip = drawn[entry.clip_id]
        assert rows[entry.clip_id]["flaw"] == (clip.flaw if isinstance(clip, FlawedScene) else "")
        assert not any(flaw in text for text in entry.captions.values() for flaw in FLAWS)
    manifest = json.loads((world / "MANIFEST.json").read_text())
    assert manifest["arguments"]["flaws"] == 0.333
    render_mini_world(plain, **SMALL, kind="combinations")
    without = json.loads((plain / "MANIFEST.json").read_text())
    good = {name for name in without["sha256"] if name.startswith("clips/")} & set(manifest["sha256"])
    assert {name: without["sha256"][name] for name in good} == {name: manifest["sha256"][name] for name in good}
    assert len(good) == sum(not row["flaw"] for row in rows.values())
    assert "flaws" not in without["arguments"]
    # Interrupted and gone on with, it is the same.
    render_mini_world(again, **SMALL, kind="combinations", flaws=0.333)
    for name in ("MANIFEST.json", *list(json.loads((again / "MANIFEST.json").read_text())["sha256"])[-5:]):
        (again / name).unlink()
    (again / "UNFINISHED.json").write_text(json.dumps({"arguments": manifest["arguments"]}))
    render_mini_world(again, **SMALL, kind="combinations", flaws=0.333)
    assert (again / "MANIFEST.json").read_text() == (world / "MANIFEST.json").read_text()
    for flaws in (0.0, 0.5):
        with pytest.raises(OtherWorldError, match=rf"flaws=0\.333 \(asked {flaws}\)"):
            render_mini_world(world, **SMALL, kind="combinations", flaws=flaws)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"flaws": 1.0, "kind": "combinations"}, "flaws: expected a share of the training clips, .* got 1$"),
        ({"flaws": -0.1, "kind": "photographs"}, "flaws: expected a share of the training clips, .* got -0.1$"),
        ({"flaws": 0.3}, "flaws: a varied world has none; choose --kind combinations or photographs"),
    ],
)
def test_impossible_shares_are_one_clear_line(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mini_world(tmp_path / "w", **{**SMALL, **change})
    assert not (tmp_path / "w").exists()
