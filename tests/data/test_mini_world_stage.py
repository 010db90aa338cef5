"""Worlds of combinations: what is held out, what clips show, and a world's files."""

from __future__ import annotations

import csv
import json
import warnings
from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from luve_lightning.cli.precompute import mini_world
from luve_lightning.data.mini_world import OtherWorldError, captions, prompts_jsonl, render_mini_world
from luve_lightning.data.mini_world.paint import paint_scene
from luve_lightning.data.mini_world.scene import (
    SPLITS,
    STAGE,
    camera_path,
    load_photograph,
    photograph_named,
    sprite_path,
)
from luve_lightning.data.mini_world.stage import MOTIONS, SPRITES, Combination, combinations_of, draw_stage
from luve_lightning.data.prompts import read_prompt_file
from luve_lightning.data.video_index import VideoIndex

SMALL = {"train": 40, "val": 3, "test": 20, "frames": 5, "size": 32, "processes": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mini") / "combinations"
    render_mini_world(folder, **SMALL, kind="combinations")
    return folder


def parts(combination: Combination) -> tuple[str, str, str]:
    return combination.photograph, combination.motion, combination.sprite


def test_a_fifth_is_held_out_and_training_shows_every_pair_of_its_parts() -> None:
    split = {name: combinations_of("combinations", name) for name in SPLITS}
    every = [combination for held in split.values() for combination in held]
    shown = [photograph.url for photograph in STAGE if photograph.split == "train"]
    assert len(every) == len(set(every)) == len(shown) * len(MOTIONS) * len(SPRITES)
    assert {combination.photograph for combination in every} == set(shown)
    for name in ("val", "test"):
        assert len(split[name]) == pytest.approx(0.1 * len(every), rel=0.05)
    pairs = {pair for combination in split["train"] for pair in combinations(parts(combination), 2)}
    for combination in split["val"] + split["test"]:
        assert set(combinations(parts(combination), 2)) <= pairs


def test_each_part_is_held_out_as_often_as_the_others() -> None:
    for name in ("val", "test"):
        held = combinations_of("combinations", name)
        for place, count in enumerate((16, 8, 8)):
            times = Counter(parts(combination)[place] for combination in held)
            assert len(times) == count
            assert max(times.values()) - min(times.values()) <= 3


def test_photographs_held_out_whole_are_in_one_split() -> None:
    shown = [{c.photograph for c in combinations_of("photographs", name)} for name in SPLITS]
    assert not any(left & right for left, right in combinations(shown, 2))
    assert shown[1:] == [{"eye", "brick"}, {"cat", "coffee", "rocket"}]
    assert combinations_of("photographs", "train") == combinations_of("combinations", "train")


def test_all_combinations_come_in_turn_and_no_photograph_twice_before_the_others() -> None:
    clips = list(draw_stage("combinations", 0, "test", 202, 5, 32, 16))
    first, second = clips[:101], clips[101:]
    assert {clip.source for clip in first} == {clip.source for clip in second}
    assert len({clip.source for clip in first}) == 101
    assert all(len({clip.url for clip in clips[at : at + 16]}) == 16 for at in (0, 16, 32))
    for part, most in (("motion", 4), ("sprite", 4)):  # of 16 clips
        assert max(Counter(getattr(clip, part) for clip in clips[:16]).values()) <= most
    assert [clip.source for clip in first] != [clip.source for clip in second]
    assert len({clip.camera for clip in clips}) == len({clip.sprites for clip in clips}) == 202
    assert list(draw_stage("combinations", 0, "test", 5, 5, 32, 16)) == clips[:5]
    assert not {clip.clip_id for clip in draw_stage("combinations", 1, "test", 9, 5, 32, 16)} & {
        clip.clip_id for clip in clips
    }


def test_cameras_stay_on_their_photograph_and_show_most_of_it() -> None:
    for clip in (clip for name in SPLITS for clip in draw_stage("photographs", 3, name, 90, 33, 192, 16)):
        _, height, width = load_photograph(photograph_named(clip.url)).shape
        centers, windows, angles = camera_path(clip.camera, 33)
        reach = windows[:, None] * (np.abs(np.cos(angles)) + np.abs(np.sin(angles)))[:, None] / 2
        assert (centers - reach).min() > -0.01
        assert (np.array([width, height]) - centers - reach).min() > -0.01
        assert windows.mean() > 0.63 * min(height, width)


def test_captions_name_the_three_parts_and_nothing_else_differs() -> None:
    texts: dict[str, set[str]] = {}
    for clip in draw_stage("combinations", 0, "train", 821, 5, 32, 16):
        caption = captions(clip)
        shown, moved, front = caption["Summarized Description"].removesuffix(" .").split(" . ")
        assert shown == f"a photograph of {photograph_named(clip.url).subject}"
        assert caption["Brief Description"] == f"{shown} . {moved} ."
        assert caption["Camera Movement"] == f"{moved} ."
        assert clip.motion in moved.split()
        assert clip.sprite in front.split()
        for part, text in zip(("photograph", "motion", "sprite"), (shown, moved, front), strict=True):
            texts.setdefault(part, set()).add(text)
        assert all(value.strip() for value in caption.values())
    assert [len(texts[part]) for part in ("photograph", "motion", "sprite")] == [16, 8, 8]
    assert "a red heart is in front" in texts["sprite"]
    assert "an orange circle is in front" in texts["sprite"]


def test_any_half_of_a_clip_shows_its_motion() -> None:
    clips = {clip.motion: clip for clip in draw_stage("combinations", 0, "train", 60, 33, 96, 16)}
    for motion, clip in clips.items():
        centers, windows, angles = camera_path(clip.camera, 33)
        for start in (0, 8, 16):
            (x, y), zoom = (centers[start + 16] - centers[start]) / windows[start], windows[start + 16] / windows[start]
            turned = np.degrees(angles[start + 16] - angles[start])
            amounts = {"right": x, "left": -x, "down": y, "up": -y, "out": zoom - 1, "in": 1 / zoom - 1}
            amounts |= {"clockwise": turned / 100, "counterclockwise": -turned / 100}
            assert amounts.pop(motion) > 0.19
            assert max(amounts.values()) < 1e-6 or motion in ("in", "out")


def test_the_first_frames_alone_are_painted_the_same() -> None:
    for clip in draw_stage("combinations", 5, "train", 4, 9, 48, 16):
        assert torch.equal(paint_scene(clip, 4), paint_scene(clip)[:4])


def test_sprites_are_of_their_colour_and_stay_in_the_frame() -> None:
    for clip in draw_stage("combinations", 5, "train", 40, 9, 96, 16):
        (sprite,) = clip.sprites
        positions, radii, _ = sprite_path(sprite, 9)
        assert np.abs(positions).max() <= 0.8
        assert radii.min() > 0.13
        frames = paint_scene(clip)
        changed = (frames != paint_scene(replace(clip, sprites=()))).any(dim=-1)
        assert 0.01 < changed.float().mean() < 0.12
        black = paint_scene(replace(clip, sprites=(replace(sprite, color=(0, 0, 0)),)))
        own = frames[(frames.int() - black.int()).amax(dim=-1) > 80].float().mean(dim=0)  # without the rim
        assert torch.cosine_similarity(own, torch.tensor(SPRITES[clip.sprite][1]).float(), dim=0) > 0.99


def test_the_index_tells_what_a_clip_is_made_of(world: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index = VideoIndex.open(world / "clips.csv")
    assert [len(index.split(name)) for name in SPLITS] == [40, 3, 20]
    with (world / "clips.csv").open(newline="") as file:
        rows = {row["clip_id"]: row for row in csv.DictReader(file)}
    for name in SPLITS:
        for entry in index.split(name):
            row, shown = rows[entry.clip_id], Combination.of(entry.url)
            assert (row["split"], row["photograph"], row["motion"], row["sprite"]) == (name, *parts(shown))
            assert shown.split == name
    spans = sorted((row["url"], int(row["start_frame"]), int(row["end_frame"])) for row in rows.values())
    assert all(left[0] != right[0] or left[2] <= right[1] for left, right in pairwise(spans))


def test_prompts_of_held_out_clips_are_a_prompt_file(world: Path) -> None:
    index = VideoIndex.open(world / "clips.csv")
    lines = read_prompt_file(world / "prompts-test.jsonl")
    assert [line.name for line in lines] == [entry.clip_id for entry in index.split("test")]
    assert [line.prompt for line in lines] == [e.captions["Summarized Description"] for e in index.split("test")]
    assert len(read_prompt_file(world / "prompts-val.jsonl")) == 3


def test_the_repositorys_prompts_are_the_first_test_clips() -> None:
    clips = list(draw_stage("combinations", 0, "test", 32, 33, 192, 16))
    assert Path("data/mini/prompts-unseen.jsonl").read_text() == prompts_jsonl(clips, "test")


def test_a_world_is_the_same_again_and_resumes(world: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    render_mini_world(again, **SMALL, kind="combinations")
    manifest = (world / "MANIFEST.json").read_text()
    assert (again / "MANIFEST.json").read_text() == manifest
    assert len(json.loads(manifest)["sha256"]) == 63 + 4
    (again / "prompts-test.jsonl").unlink()
    gone = next((again / "clips").iterdir())
    gone.unlink()
    assert render_mini_world(again, **SMALL, kind="combinations").rendered == (gone.stem,)
    assert (again / "MANIFEST.json").read_text() == manifest


def test_references_alone_are_a_world(tmp_path: Path) -> None:
    render_mini_world(tmp_path / "w", 7, 0, 0, 4, frames=5, size=32, processes=1, kind="combinations")
    index = VideoIndex.open(tmp_path / "w" / "clips.csv")
    assert [len(index.split(name)) for name in SPLITS] == [0, 0, 4]
    assert not (tmp_path / "w" / "prompts-val.jsonl").exists()


def test_kinds_are_not_mixed(world: Path, tmp_path: Path) -> None:
    with pytest.raises(OtherWorldError, match=r"kind=combinations \(asked photographs\)"):
        render_mini_world(world, **SMALL, kind="photographs")
    with pytest.raises(OtherWorldError, match=r"kind=combinations \(asked varied\)"):
        render_mini_world(world, **SMALL)
    old = {"seed": 0, "train": 1, "val": 1, "test": 1, "frames": 5, "size": 32, "fps": 16, "renderer": 1}
    (tmp_path / "MANIFEST.json").write_text(json.dumps({"arguments": old, "sha256": {}}))
    with pytest.raises(OtherWorldError, match=r"kind=varied \(asked combinations\), .*renderer=1 \(asked"):
        render_mini_world(tmp_path, 0, 32, 1, 1, 5, 32, kind="combinations")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": 3}, "train: 3 is too few: validation and test also show "),
        ({"train": 0, "val": 0, "test": 0}, "expected a clip in one of them"),
        ({"test": -1}, "test: expected 0 or more, got -1"),
    ],
)
def test_impossible_counts_are_one_clear_line(tmp_path: Path, change: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        mini_world(tmp_path / "w", **{**SMALL, **change}, kind="combinations")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "w").exists()


def test_a_missing_photograph_is_one_clear_line() -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg: the repository holds this photograph"):
        load_photograph(replace(photograph_named("raccoon"), file="gone.jpg"))
    with pytest.raises(FileNotFoundError, match=r"reinstall matplotlib"):
        load_photograph(replace(photograph_named("officer"), file="gone.jpg"))
