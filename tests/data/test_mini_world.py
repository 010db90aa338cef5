"""The mini world as files: the same bytes for a seed, held-out photographs, resuming, refusing."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from luve_lightning.cli.precompute import mini_world
from luve_lightning.data.mini_world import CRF, OtherWorldError, render_mini_world, vocabulary
from luve_lightning.data.mini_world.paint import draw_scene, paint_scene
from luve_lightning.data.mini_world.scene import photographs_of
from luve_lightning.data.video_files import encode_h264
from luve_lightning.files import unfinished_path
from tests.helpers.renames import KILLED

SMALL = {"train": 4, "val": 1, "test": 1, "frames": 9, "size": 64}
# UltraVideo's header, as its own CSV has it.
HEADER = (
    "clip_id,url,frame_width,frame_height,fps,start_frame,end_frame,total_frames,start_time,end_time,duration,"
    "vtss_score,motion_score,video_clip_score,Brief Description,Detailed Description,Background,"
    "Theme Description,Style,Shot Type,Camera Movement,Lighting,Video Atmosphere,Summarized Description"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mini") / "world"
    render_mini_world(folder, **SMALL, processes=1)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "clips.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.slow
def test_a_seed_gives_the_same_bytes_on_one_and_two_processes(world: Path, tmp_path: Path) -> None:
    render_mini_world(tmp_path / "again", **SMALL, processes=2)
    assert len(hashes(world)) == 6 + 3
    assert hashes(tmp_path / "again") == hashes(world)


def test_another_seed_gives_other_clips(world: Path, tmp_path: Path) -> None:
    render_mini_world(tmp_path, seed=1, train=1, val=1, test=1, frames=5, size=32, processes=1)
    assert not {row["clip_id"] for row in rows(tmp_path)} & {row["clip_id"] for row in rows(world)}
    zero, one = (draw_scene(seed, "train", 0, 9, 64, 16) for seed in (0, 1))
    assert zero.camera != one.camera


def test_the_csv_is_ultravideos(world: Path) -> None:
    assert (world / "clips.csv").read_text().splitlines()[0] == HEADER
    for row in rows(world):
        assert all(value.strip() for value in row.values())
        assert len(row["clip_id"]) == 40
        assert set(row["clip_id"]) <= set("0123456789abcdef")
        assert (row["frame_width"], row["frame_height"], row["total_frames"], row["fps"]) == ("64", "64", "9", "16")
        assert int(row["end_frame"]) - int(row["start_frame"]) == 9
        assert float(row["duration"]) == pytest.approx(9 / 16)


def test_clips_of_one_photograph_do_not_overlap_in_its_time(world: Path, tmp_path: Path) -> None:
    render_mini_world(tmp_path, train=1, val=5, test=1, frames=5, size=32, processes=1)
    spans = [(row["url"], int(row["start_frame"]), int(row["end_frame"])) for row in rows(tmp_path)]
    for url in {span[0] for span in spans}:
        mine = sorted(span[1:] for span in spans if span[0] == url)
        assert all(left[1] <= right[0] for left, right in pairwise(mine))


def test_no_photograph_and_no_scene_is_shared_between_splits(world: Path) -> None:
    splits = json.loads((world / "splits.json").read_text())
    assert list(splits) == ["train", "val", "test"]
    urls = [url for split in splits.values() for url in split]
    assert len(urls) == len(set(urls))
    assert {row["url"] for row in rows(world)} == set(urls)
    subjects = [{photograph.subject for photograph in photographs_of(split)} for split in splits]
    assert not subjects[0] & subjects[1]
    assert not subjects[0] & subjects[2]
    assert not subjects[1] & subjects[2]


def test_sprites_are_cut_from_photographs_of_their_own_split() -> None:
    for split in ("train", "val", "test"):
        mine = {photograph.url for photograph in photographs_of(split)}
        scenes = [draw_scene(3, split, index, 9, 64, 16) for index in range(30)]
        textures = {sprite.texture for scene in scenes for sprite in scene.sprites}
        assert textures
        assert textures <= mine
        assert all(sprite.texture != scene.url for scene in scenes for sprite in scene.sprites)


def test_every_clip_decodes_and_moves(world: Path) -> None:
    for row in rows(world):
        frames = decode(world / "clips" / f"{row['clip_id']}.mp4").astype(np.float64)
        assert frames.shape == (9, 64, 64, 3)
        assert frames.std() > 5
        assert np.abs(frames[-1] - frames[0]).mean() > 1.0


def test_clips_are_tagged_and_come_back_in_their_own_colours(tmp_path: Path) -> None:
    colors = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [230, 220, 40]], dtype=np.uint8)
    frames = np.broadcast_to(colors.repeat(16, axis=0)[None, None], (5, 64, 64, 3)).copy()
    encode_h264(tmp_path / "a.mp4", frames, 16, CRF)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert context.name == "h264"
        assert context.pix_fmt == "yuv420p"
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)
    decoded = decode(tmp_path / "a.mp4")[:, :, 8::16].astype(int)
    # A matrix mixed up between encoder and decoder moves the green bar by 20 and more.
    assert np.abs(decoded - colors.astype(int)).max() <= 4
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_encoding_does_not_depend_on_what_memory_held_before(tmp_path: Path) -> None:
    # x264's macroblock tree reads memory that nothing wrote: with it, these encodes differ from each other.
    frames = paint_scene(draw_scene(0, "train", 5, 9, 192, 16)).numpy()
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(12):
        junk = [rng.integers(0, 255, int(rng.integers(1_000, 300_000)), dtype=np.uint8) for _ in range(20)]
        del junk
        encode_h264(tmp_path / "a.mp4", frames, 16, CRF)
        found.add(hashlib.sha256((tmp_path / "a.mp4").read_bytes()).hexdigest())
    assert len(found) == 1


def test_captions_keep_to_the_vocabulary(world: Path) -> None:
    words = set(vocabulary())
    assert len(words) <= 120
    described = list(rows(world)[0])[14:]
    for row in rows(world):
        for column in described:
            assert set(row[column].split()) <= words, column


@pytest.mark.slow
def test_a_missing_or_damaged_clip_alone_is_rendered_again(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    render_mini_world(folder, **SMALL, processes=1)
    before = hashes(folder)
    clips = sorted((folder / "clips").iterdir())
    clips[0].unlink()
    clips[1].write_bytes(clips[1].read_bytes()[:-100])
    kept = {path: path.stat().st_mtime_ns for path in clips[2:]}
    report = render_mini_world(folder, **SMALL, processes=1)
    assert sorted(report.rendered) == [clips[0].stem, clips[1].stem]
    assert report.kept == 4
    assert {path: path.stat().st_mtime_ns for path in clips[2:]} == kept
    assert hashes(folder) == before


def test_a_complete_world_is_left_alone(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    mini_world(world, **SMALL)
    assert "nothing to render" in " ".join(capsys.readouterr().out.split())
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before


@pytest.mark.slow
def test_a_killed_run_goes_on(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    code = KILLED.format("*/clips/*.mp4", 3) + (
        "from pathlib import Path; from luve_lightning.data.mini_world import render_mini_world\n"
        f"render_mini_world(Path({str(folder)!r}), **{SMALL!r}, processes=1)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (folder / "MANIFEST.json").exists()
    with subprocess.Popen(["true"]) as gone:
        pass
    mine = unfinished_path(folder / "clips" / "left.mp4")
    orphan = mine.with_name(mine.name.replace(f".{os.getpid()}.", f".{gone.pid}."))
    orphan.write_bytes(b"half a clip")
    report = render_mini_world(folder, **SMALL, processes=1)
    assert report.kept == 2
    assert not orphan.exists()
    assert hashes(folder) == hashes(world)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 7}, "seed=0 (asked 7)"),
        ({"train": 5}, "train=4 (asked 5)"),
        ({"frames": 13, "size": 80}, "frames=9 (asked 13), size=64 (asked 80)"),
    ],
)
def test_a_folder_of_other_arguments_is_refused(world: Path, change: dict[str, int], words: str) -> None:
    before = hashes(world)
    with pytest.raises(OtherWorldError) as error:
        render_mini_world(world, **{**SMALL, **change}, processes=1)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert hashes(world) == before


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not lose this")
    with pytest.raises(OtherWorldError, match="holds no mini world"):
        render_mini_world(tmp_path, **SMALL, processes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "[]", "5", "{}", '{"arguments": [], "sha256": {}}', '{"arguments": {}, "sha256": [1]}']
)
def test_a_strange_manifest_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "MANIFEST.json").write_text(content)
    with pytest.raises(OtherWorldError, match=r"MANIFEST\.json: is not"):
        render_mini_world(tmp_path, **SMALL, processes=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
        ({"val": 0}, "val: expected 1 or more, got 0"),
        ({"frames": 12}, "such as 9 or 13"),
        ({"frames": 1}, "frames: expected 4k+1, at least 5"),
        ({"size": 100}, "such as 96 or 112"),
        ({"processes": 0}, "processes: expected 1 or more, got 0"),
    ],
)
def test_impossible_values_are_one_clear_line(tmp_path: Path, change: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError) as error:
        mini_world(tmp_path / "w", **{**SMALL, **change})
    assert words in str(error.value)
    assert not (tmp_path / "w").exists()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes by /proc")
def test_the_processes_that_render_end_with_a_killed_program(tmp_path: Path) -> None:
    text = "import sys, pathlib; from luve_lightning.data.mini_world import render_mini_world as render\n"
    text += "if __name__ == '__main__': render(pathlib.Path(sys.argv[1]), train=5000, val=1, test=1, processes=2)\n"
    (script := tmp_path / "render.py").write_text(text)
    program = subprocess.Popen([sys.executable, script, tmp_path / "world"])
    try:
        while not list((tmp_path / "world").rglob("*.mp4")):
            assert program.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
        assert len(children) >= 2
    finally:
        program.kill()
        program.wait()
    while any(Path(f"/proc/{child}").exists() for child in children):  # the test's own limit ends it
        time.sleep(0.05)
