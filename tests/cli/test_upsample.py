"""`luve upsample`: what each folder holds, what is skipped, and what is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from luve_lightning.cascade.upsampling import baselines
from luve_lightning.data.clips import read_clip
from luve_lightning.data.video_files import find_videos, read_video, write_video
from luve_lightning.data.video_index import VideoIndex
from luve_lightning.evaluation.super_resolution import load_super_resolver, super_resolved
from luve_lightning.functional.interpolation import interpolate_latents
from luve_lightning.functional.pixels import frames_to_video, resize_video, video_to_frames
from luve_lightning.models.backbones import load_backbone
from tests.helpers.run_luve import Outcome, run_luve
from tests.helpers.small_world import add_row, write_world
from tests.helpers.upsampling import tiny_vluer
from tests.helpers.video_files import set_matrix
from tests.models.test_super_resolution import tiny, video

FRAMES, SIZE = 5, 48
METHODS = ["reference", "bilinear", "rgb_bicubic", "learned", "vae"]

Luve = Callable[..., Outcome]


@pytest.fixture(scope="module")
def vluer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vluer")
    tiny_vluer().save_pretrained(folder)
    return folder


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return write_world(tmp_path / "world", 2)


@pytest.fixture
def luve(capsys: pytest.CaptureFixture[str], tmp_path: Path, world: Path, tiny_backbone: Path, vluer: Path) -> Luve:
    def run(**options: object) -> Outcome:
        given: dict[str, object] = {
            "backbone": tiny_backbone,
            "index": world,
            "output": tmp_path / "out",
            "size": f"[{SIZE}, {SIZE}]",
            "scale": 2,
            "frames": FRAMES,
            "vluers.learned": vluer,
            "baselines": "[bilinear, rgb_bicubic]",
            "device": "cpu",
        }
        return run_luve(capsys, "upsample", *(f"--{k}={v}" for k, v in (given | options).items()))

    return run


def totals(outcome: Outcome) -> tuple[int, ...]:
    """Written, already there, unreadable."""
    return outcome.numbers(r"  written +(\d+) videos?", r"  already there +(\d+)", r"  unreadable +(\d+) clips?")


def test_every_folder_holds_what_its_method_makes(
    luve: Luve, tmp_path: Path, world: Path, tiny_backbone: Path, vluer: Path
) -> None:
    assert totals(luve(measured=tmp_path / "took.json")) == (2 * len(METHODS), 0, 0)
    took = json.loads((tmp_path / "took.json").read_text())
    assert (took["done"], took["made"]) == (2, 2 * len(METHODS))
    parts = [took["parts"][part] for part in ("reading", "upsampling", "writing")]
    assert sum(parts) == pytest.approx(took["parts"]["seconds"], abs=1e-3)
    assert sum(parts) <= took["seconds_per_unit"] + 1e-3, "those of the first clip are left out"
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == sorted(METHODS)
    entry = VideoIndex.from_csv(world).entries[0]
    own = read_clip(entry.path, 0, FRAMES)
    codec = load_backbone(tiny_backbone).latent_space()
    video = frames_to_video(own)[None]
    low = codec.encode(resize_video(video, (SIZE // 2, SIZE // 2)))
    size = (2, SIZE // 8, SIZE // 8)
    with torch.no_grad():
        expected = {
            "bilinear": codec.decode(interpolate_latents(low, size)),
            "learned": codec.decode(tiny_vluer().eval()(low, size)),
            "vae": codec.decode(codec.encode(video)),
        }
    made = {name: read_video(tmp_path / "out" / name / f"{entry.clip_id}.mp4") for name in METHODS}
    assert np.array_equal(made["reference"][0], own)
    assert made["reference"][1] == entry.fps
    for name, decoded in expected.items():
        # Clips are decoded together, which may round differently.
        difference = np.abs(made[name][0].astype(int) - video_to_frames(decoded)[0].numpy())
        assert difference.max() <= 1, name
    about = json.loads((tmp_path / "out" / "bilinear" / f"{entry.clip_id}.json").read_text())
    assert about["prompt"] == entry.captions["Summarized Description"]
    assert about["recipe"]["scale"] == 2


def test_clips_are_read_by_time(luve: Luve, tmp_path: Path, world: Path) -> None:
    assert totals(luve(fps=8, frames=5)) == (10, 0, 0)
    entry = VideoIndex.from_csv(world).entries[0]
    frames, fps = read_video(tmp_path / "out" / "reference" / f"{entry.clip_id}.mp4")
    assert np.array_equal(frames, read_clip(entry.path, 0, 5, stride=2))
    assert fps == 8
    assert totals(luve(fps=8, frames=5)) == (0, 10, 0)
    assert totals(luve(frames=5)) == (10, 0, 0)
    assert "16 frames a second, less than half of 33" in luve(fps=33, frames=5).out


def test_what_is_there_and_was_made_so_is_skipped(luve: Luve, tmp_path: Path) -> None:
    luve()
    folder = tmp_path / "out"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}
    assert totals(luve()) == (0, 10, 0)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")} == before
    # A kill between the video and its JSON file, and a video that was deleted.
    find_videos(folder / "bilinear")[0].with_suffix(".json").unlink()
    lost = find_videos(folder / "vae")[1]
    frames, _ = read_video(lost)
    lost.unlink()
    # Another number of threads writes the same frames, and makes nothing anew.
    assert totals(luve(encoder_threads=3)) == (2, 8, 0)
    assert np.array_equal(read_video(lost)[0], frames)


@pytest.mark.slow
def test_what_is_made_later_is_the_same_to_the_bit(luve: Luve, tmp_path: Path) -> None:
    luve()
    whole = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    for method in METHODS:
        for path in (tmp_path / "out" / method).iterdir():
            path.unlink()
        assert totals(luve()) == (2, 8, 0)
        changed = [path for path, content in whole.items() if path.read_bytes() != content]
        assert not changed, f"{method} alone is another than with the rest"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "remade"),
    [
        ({"scale": 3}, {"bilinear", "rgb_bicubic", "learned"}),
        ({"frames": 9}, set(METHODS)),
        ({"caption": "Background"}, set(METHODS)),
    ],
)
def test_another_recipe_is_made_anew(luve: Luve, tmp_path: Path, options: dict[str, object], remade: set[str]) -> None:
    luve()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.mp4")}
    assert totals(luve(**options))[0] == 2 * len(remade)
    changed = {path.parent.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == remade


@pytest.mark.slow
def test_no_old_recipe_vouches_for_a_new_video(luve: Luve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run by another recipe that ends between a video and its JSON file."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    luve()
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.mp4")}
    with monkeypatch.context() as patch:
        patch.setattr("luve_lightning.evaluation.upsampled_clips.write_text", full)
        assert "No space left on device" in luve(scale=3).err
    assert {path for path in before if path.read_bytes() != before[path]}, "the other recipe's"
    luve()
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_another_vluer_of_the_same_name_is_made_anew(luve: Luve, tmp_path: Path) -> None:
    luve()
    tiny_vluer(seed=1).save_pretrained(tmp_path / "other")
    assert totals(luve(**{"vluers.learned": tmp_path / "other"})) == (2, 8, 0)


@pytest.mark.slow
def test_a_changed_or_damaged_clip(luve: Luve, world: Path) -> None:
    luve()
    first, second = (entry.path for entry in VideoIndex.from_csv(world).entries)
    write_video(first, np.zeros((9, 48, 48, 3), np.uint8), 16)
    second.write_text("no video")
    outcome = luve()
    assert totals(outcome) == (len(METHODS), 0, 1)
    assert f"{second.stem}: " in outcome.out
    first.write_text("no video")
    outcome = luve()
    assert outcome.code == 2
    assert "none of the 2 clips" in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 5}, "scale 5 makes 48 x 48 into 9.6 x 9.6 pixels"),
        ({"scale": 4}, "height 12: expected a multiple of 8"),
        ({"scale": 1}, "scale: expected a number > 1"),
        ({"frames": 6}, "6 frames: expected 4k + 1"),
        ({"baselines": "[lanczos]"}, f"baselines: expected some of {', '.join(baselines())}, got lanczos"),
        ({"vluers.bilinear": "x"}, "vluers: bilinear is the name of another method"),
        ({"vluers.learned": "nothing"}, "vluers.learned: nothing has no config.json"),
        ({"vluers": "{../../x: nothing}"}, "vluers: '../../x': expected letters, digits"),
        ({"vluers": "{'..': nothing}"}, "vluers: '..': expected letters, digits"),
        ({"caption": "Title"}, "caption: expected one of Brief Description"),
        ({"limit": 0}, "limit >= 1"),
        ({"encoder_threads": 0}, "encoder_threads: expected 1 to"),
        ({"splits": "[val]"}, "no clips in val"),
        ({"output": __file__}, f"output: {__file__} is not a folder"),
    ],
)
def test_mistakes_are_one_line(luve: Luve, options: dict[str, object], message: str) -> None:
    outcome = luve(**options)
    assert outcome.code == 2
    assert message in outcome.err
    assert len(outcome.error_lines) == 1


def test_rows_left_out_and_clips_shown_otherwise_are_told(luve: Luve, world: Path, tmp_path: Path) -> None:
    add_row(world, clip_id="a boat", url="x")
    first, second = VideoIndex.from_csv(world).entries
    set_matrix(first.path, 1, 1, -1, 1)
    upright = read_clip(second.path, 0, FRAMES)
    assert totals(luve(**{"keep.min_width": 48, "baselines": "[bilinear]"})) == (4, 0, 1)
    # A video made of the clip when it was read otherwise counts as missing, and so does what is mirrored from now on.
    set_matrix(second.path, -1, 0, 0, 1)
    for about in (tmp_path / "out").glob("*/*.json"):
        content = json.loads(about.read_text())
        content["recipe"]["clip"] = hashlib.sha256(second.path.read_bytes()).hexdigest()
        about.write_text(json.dumps(content))
    outcome = luve(**{"keep.min_width": 48, "baselines": "[bilinear]"})
    assert totals(outcome) == (4, 0, 1)
    assert "2 clips of 2 source videos, 1 row dropped" in outcome.out
    assert "is shown turned or sheared otherwise" in outcome.out
    mirrored, _ = read_video(tmp_path / "out" / "reference" / f"{second.clip_id}.mp4")
    np.testing.assert_array_equal(mirrored, upright[:, :, ::-1])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RealBasicVSR's names in a file of a few channels."""
    file = tmp_path_factory.mktemp("weights") / "realbasicvsr.pth"
    torch.save({"state_dict": {f"generator_ema.{name}": x for name, x in tiny().state_dict().items()}}, file)
    return file


@pytest.fixture
def generated(tmp_path: Path) -> Path:
    """What `luve generate --keep_stages true` leaves: motion/ with videos, whose prompts lie in the folder above."""
    for number, name in enumerate(("a-boat", "a-tree")):
        frames = video_to_frames(video(1, 5, 16, 24, seed=number))[0].numpy()
        write_video(tmp_path / "run" / "motion" / f"{name}.mp4", frames, 16, lossless=True)
        (tmp_path / "run" / f"{name}.json").write_text(json.dumps({"prompt": name.replace("-", " ")}))
    return tmp_path / "run" / "motion"


def test_networks_see_what_the_low_resolution_decodes_to(
    luve: Luve, tmp_path: Path, world: Path, tiny_backbone: Path, weights: Path
) -> None:
    given = {"baselines": "[bilinear]", "super_resolution": f"vsr={weights}"}
    assert totals(luve(**given)) == (10, 0, 0)
    entry = VideoIndex.from_csv(world).entries[0]
    codec = load_backbone(tiny_backbone).latent_space()
    low = resize_video(frames_to_video(read_clip(entry.path, 0, FRAMES))[None], (SIZE // 2, SIZE // 2))
    expected = super_resolved(load_super_resolver(weights), codec.decode(codec.encode(low)), (SIZE, SIZE))[0]
    made, _ = read_video(tmp_path / "out" / "vsr" / f"{entry.clip_id}.mp4")
    assert np.abs(made.astype(int) - expected.numpy()).max() <= 1
    about = json.loads((tmp_path / "out" / "vsr" / f"{entry.clip_id}.json").read_text())
    assert about["enlarged"] == "4x by RealBasicVSR, then resized to 48x48 by an antialiased bicubic filter"
    assert about["recipe"]["network"] == "RealBasicVSR"
    assert totals(luve(**given)) == (0, 10, 0)
    torch.save(tiny(seed=1).state_dict(), tmp_path / "other.pth")
    assert totals(luve(**given | {"super_resolution": f"vsr={tmp_path / 'other.pth'}"})) == (2, 8, 0)


def test_videos_are_the_low_resolution_themselves(
    luve: Luve, tmp_path: Path, generated: Path, tiny_backbone: Path, weights: Path
) -> None:
    given = {"index": "null", "videos": generated, "size": "null", "frames": "null", "baselines": "[bilinear]"}
    given |= {"super_resolution.vsr": weights}
    assert totals(luve(**given)) == (6, 0, 0)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["bilinear", "learned", "vsr"]
    low = frames_to_video(read_video(generated / "a-boat.mp4")[0])[None]
    codec = load_backbone(tiny_backbone).latent_space()
    expected = {
        "vsr": super_resolved(load_super_resolver(weights), low, (32, 48)),
        "bilinear": video_to_frames(codec.decode(interpolate_latents(codec.encode(low), (2, 4, 6)))),
    }
    for name, frames in expected.items():
        made, fps = read_video(tmp_path / "out" / name / "a-boat.mp4")
        assert fps == 16
        assert np.abs(made.astype(int) - frames[0].numpy()).max() <= 1
    about = json.loads((tmp_path / "out" / "vsr" / "a-boat.json").read_text())
    assert about["prompt"] == "a boat"
    assert (about["recipe"]["size"], about["recipe"]["frames"]) == ([32, 48], 5)
    assert "vae" not in about["recipe"]
    assert totals(luve(**given)) == (0, 6, 0)
    (generated.parent / "a-boat.json").write_text(json.dumps({"prompt": "a ship"}))
    assert totals(luve(**given)) == (3, 3, 0)
    assert totals(luve(**given | {"size": "[40, 64]", "scale": "null", "frames": 1})) == (6, 0, 0)


def test_videos_that_cannot_be_enlarged_are_named(luve: Luve, generated: Path, weights: Path) -> None:
    (generated / "broken.mp4").write_text("no video")
    write_video(generated / "short.mp4", np.zeros((4, 16, 24, 3), np.uint8), 16)
    given = {"index": "null", "videos": generated, "scale": "null", "size": "[32, 48]", "frames": "null"}
    outcome = luve(**given, baselines="[bilinear]", **{"vluers.learned": "null"})
    assert totals(outcome) == (2, 0, 2)
    assert "short: 4 frames: expected 4k + 1" in outcome.out
    assert "no prompt      1 video (first short)" in outcome.out
    # Pixels need no 4k + 1.
    alone = {"baselines": "[]", "vluers.learned": "null", "super_resolution.vsr": weights}
    assert totals(luve(**given, **alone)) == (3, 0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index": "null"}, "index: required, but not given"),
        ({"videos": "."}, "index: is for clips of an index; expected it without videos"),
        ({"videos": ".", "index": "null"}, "videos: expected size, or scale and not both"),
        ({"videos": ".", "index": "null", "scale": "null", "fps": 8}, "fps: is for clips of an index"),
        ({"videos": "nothing", "index": "null", "scale": "null"}, "nothing: no such folder of videos"),
        ({"super_resolution.vsr": "nothing.pth"}, "super_resolution.vsr: nothing.pth: no such file"),
        ({"super_resolution.vae": "x.pth"}, "super_resolution: vae is the name of another method"),
        ({"super_resolution.learned": "x.pth"}, "super_resolution: learned is the name of another method"),
        ({"super_resolution.vsr": __file__}, "expected weights as .pth or .safetensors"),
    ],
)
def test_mistakes_about_networks_and_videos_are_one_line(luve: Luve, options: dict[str, object], message: str) -> None:
    outcome = luve(**options)
    assert outcome.code == 2
    assert message in outcome.err
    assert len(outcome.error_lines) == 1
