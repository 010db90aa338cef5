"""`luve precompute` in this process: what it stores, skips, refuses and prints."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from luve_lightning.__main__ import main
from luve_lightning.data.clip_windows import find_pair_keys
from luve_lightning.data.clips import probe_clip, read_clip
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.latent_store import LatentStore
from luve_lightning.data.store import StoreError
from luve_lightning.data.video_index import ClipEntry, VideoIndex
from luve_lightning.functional.pixels import fit_frames, frames_to_video
from luve_lightning.models.backbones import load_backbone
from tests.helpers.precomputing import find, on_world, recipe, summary
from tests.helpers.run_luve import Outcome
from tests.helpers.small_world import change_rows, write_backbone, write_world
from tests.helpers.video_files import set_matrix, write_video


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return write_world(tmp_path, 3)


@pytest.fixture
def luve(capsys: pytest.CaptureFixture[str], world: Path, tiny_backbone: Path, tmp_path: Path):
    return on_world(capsys, world, tiny_backbone, tmp_path)


@pytest.mark.slow
def test_latents_are_those_of_the_downscaled_frames(luve, world: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    assert summary(luve(dtype="float32")) == (12, 0, 0)
    codec = load_backbone(tiny_backbone).latent_space()
    store = LatentStore(tmp_path / "store")
    for pair in find(store.root, world, recipe(tiny_backbone, dtype="float32")).pairs:
        frames = read_clip(pair.entry.path, 0, 9)
        high = codec.encode(frames_to_video(frames).unsqueeze(0))[0]
        torch.testing.assert_close(store.read(pair.hr_key), high, atol=1e-4, rtol=1e-3)
        for scale, key in pair.lr_keys.items():
            side = round(48 / scale)
            # Pillow filters 8-bit frames; the difference to the float filter is half a level.
            small = np.stack([np.asarray(Image.fromarray(f).resize((side, side), Image.BICUBIC)) for f in frames])
            low = codec.encode(frames_to_video(small).unsqueeze(0))[0]
            assert store.shape(key) == (16, 3, side // 8, side // 8)
            assert (store.read(key) - low).abs().max() < 0.05 * low.std()


@pytest.mark.slow
def test_second_run_decodes_nothing_and_third_fills_a_gap(
    luve, world: Path, tiny_backbone: Path, tmp_path, recwarn: pytest.WarningsRecorder
) -> None:
    time.sleep(2.1)  # hashes of files written a moment ago are not remembered
    assert summary(luve()) == (12, 0, 0)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.safetensors")}
    assert summary(luve()) == (0, 12, 0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.safetensors")} == before
    words = [f"--backbone={tiny_backbone}", f"--index={world}", f"--store={tmp_path / 'store'}", "--frames=9"]
    words += ["--size=[48, 48]", "--scales=[2]", "--trainer.accelerator=cpu"]
    main(["precompute", *words])
    assert not [told for told in recwarn if "is zero" in str(told.message)], "nothing left to do is no fault"
    gap = find(tmp_path / "store", world, recipe(tiny_backbone)).pairs[1].lr_keys[2.0]
    store = LatentStore(tmp_path / "store")
    content = store.path(gap).read_bytes()
    store.path(gap).unlink()
    assert summary(luve()) == (1, 11, 0)
    assert store.path(gap).read_bytes() == content, "the same bits, alone in its batch or not"


@pytest.mark.slow
def test_loader_workers_and_batch_order_change_no_bit(luve, world: Path, tmp_path: Path) -> None:
    luve(num_workers=2)
    lines = world.read_text().splitlines()
    (tmp_path / "other.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    luve(index=tmp_path / "other.csv", store=tmp_path / "other")
    assert contents(tmp_path / "store") == contents(tmp_path / "other")
    assert len(contents(tmp_path / "store")) == 12


def contents(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.glob("??/*")}


def test_windows_strides_and_one_split(luve, world: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "splits.json").write_text('{"train": ["source-0", "source-2"], "val": ["source-1"], "test": []}')
    outcome = luve(frames=1, windows=3, start=1, scales="[3]", splits="[train]")
    assert summary(outcome) == (12, 0, 0)
    assert outcome.out.splitlines()[1].startswith("2 clips, 6 windows of 2 latents")
    train = VideoIndex.from_csv(world).split("train")
    store = LatentStore(tmp_path / "store")
    what = recipe(tiny_backbone, frames=1, windows=3, start=1, scales=(3,))
    pairs = find_pair_keys(store, ClipHashes(store.root), train, what).pairs
    assert [pair.hr_key.frames for pair in pairs] == [(1, 2), (5, 6), (8, 9)] * 2
    nothing = luve(splits="[test]")
    assert (nothing.code, nothing.error_lines) == (2, [f"luve precompute: error: {world}: no clips in test"])


@pytest.mark.slow
def test_larger_clips_are_cropped_and_downscaled(luve, tiny_backbone: Path, tmp_path: Path) -> None:
    index = write_world(tmp_path / "large", 1, height=112, width=144)
    assert summary(luve(index=index, dtype="float32")) == (4, 0, 0)
    pair = find(tmp_path / "store", index, recipe(tiny_backbone, dtype="float32")).pairs[0]
    frames = read_clip(pair.entry.path, 0, 9)[:, :, 16:128]
    small = np.stack([np.asarray(Image.fromarray(f).resize((48, 48), Image.BICUBIC)) for f in frames])
    high = load_backbone(tiny_backbone).latent_space().encode(frames_to_video(small).unsqueeze(0))[0]
    stored = LatentStore(tmp_path / "store").read(pair.hr_key)
    assert (stored - high).abs().max() < 0.05 * high.std()


@pytest.mark.slow
def test_other_vae_and_changed_clip_get_entries_of_their_own(
    luve, world: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    luve()
    other = write_backbone(tmp_path / "other", seed=1)
    with pytest.raises(StoreError, match="3 of 3 clips have no latents"):
        find(tmp_path / "store", world, recipe(other))
    assert summary(luve(backbone=other)) == (12, 0, 0)
    clip = VideoIndex.from_csv(world).entries[0].path
    clip.write_bytes(clip.read_bytes() + b"\0")  # still plays
    with pytest.raises(StoreError, match="1 of 3 clips have no latents"):
        find(tmp_path / "store", world, recipe(tiny_backbone))
    assert summary(luve()) == (4, 8, 0)
    assert len(find(tmp_path / "store", world, recipe(tiny_backbone)).pairs) == 3


@pytest.mark.slow
def test_clips_are_encoded_as_they_are_shown(luve, world: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    turned, odd, uneven = (entry.path for entry in VideoIndex.from_csv(world).entries)
    upright = read_clip(turned, 0, 9)
    set_matrix(turned, -1, 0, 0, 1)
    set_matrix(odd, 1, 1, -1, 1)
    write_video(uneven.parent, count=9, name=uneven.stem, pts=[0, 1, 2, 3, 4, 8, 12, 16, 20])
    outcome = luve(dtype="float32")
    assert summary(outcome) == (8, 0, 1)
    assert f"variable rate  1 clip (first {uneven.stem}): frames are counted, not timed" in outcome.out
    (listed,) = (tmp_path / "store" / "quarantine").iterdir()
    assert "is shown turned or sheared otherwise" in listed.read_text()
    lookup = find(tmp_path / "store", world, recipe(tiny_backbone, dtype="float32"))
    assert [clip for clip, _ in lookup.dropped] == [odd.stem]
    assert lookup.uneven == [uneven.stem]
    video = frames_to_video(upright[:, :, ::-1]).unsqueeze(0)
    high = load_backbone(tiny_backbone).latent_space().encode(video)[0]
    torch.testing.assert_close(LatentStore(tmp_path / "store").read(lookup.pairs[0].hr_key), high, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_clips_are_read_by_time(luve, world: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    """Every frame at 16 a second is the one on screen then, in a slow, a fast and an uneven clip."""
    slow, fast, uneven = VideoIndex.from_csv(world).entries
    milliseconds = [0, 40, 80, 120, 160, 290, 330, 550, 590, 640]
    files: dict[ClipEntry, tuple[Fraction, Sequence[int]]] = {
        slow: (Fraction(1, 12), range(8)),
        fast: (Fraction(1, 24), range(14)),
        uneven: (Fraction(1, 1000), milliseconds),
    }
    for number, (entry, (unit, pts)) in enumerate(files.items()):
        info = probe_clip(write_video(entry.path.parent, count=len(pts), name=entry.clip_id, pts=pts, unit=unit))
        change_rows(world, number, fps=f"{info.fps:.6g}", total_frames=str(info.frames))
    outcome = luve(fps=16, dtype="float32", scales="[]")
    assert summary(outcome) == (3, 0, 0)
    assert f"repeat frames  2, slower than 16 a second, first {slow.clip_id}" in outcome.out
    assert "variable rate" not in outcome.out
    assert summary(luve(fps=16, dtype="float32", scales="[]")) == (0, 3, 0)
    store, codec = LatentStore(tmp_path / "store"), load_backbone(tiny_backbone).latent_space()
    what = recipe(tiny_backbone, scales=(), dtype="float32", fps=16)
    lookup = find(store.root, world, what)
    assert (lookup.repeated, lookup.uneven) == ([slow.clip_id, uneven.clip_id], [])
    expected = {
        slow.clip_id: [0, 0, 1, 2, 3, 3, 4, 5, 6],
        fast.clip_id: [0, 1, 3, 4, 6, 7, 9, 10, 12],
        uneven.clip_id: [0, 1, 3, 4, 4, 5, 6, 6, 6],  # at 0, 62.5, 125, ... ms
    }
    for pair in lookup.pairs:
        frames = read_clip(pair.entry.path, 0, pair.entry.total_frames)[expected[pair.entry.clip_id]]
        video = fit_frames(torch.from_numpy(frames), (48, 48)).unsqueeze(0)
        torch.testing.assert_close(store.read(pair.hr_key), codec.encode(video)[0], atol=1e-4, rtol=1e-3)
    with pytest.raises(StoreError, match=r"stride 1, 24 frames a second\), VAE"):
        find(store.root, world, replace(what, frames=5, fps=24))
    outcome = luve(fps=32, frames=17, scales="[]")
    assert f"left out       2, first {slow.path}: 12 frames a second, less than half of 32" in outcome.out


@pytest.mark.slow
def test_variants_have_entries_of_their_own(luve, world: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    transform = f"{{class_path: tests.helpers.recording.Recording, init_args: {{log: {tmp_path}/log}}}}"
    plain = "{class_path: luve_lightning.data.variants.Unchanged}"
    assert summary(luve(variants=f"{{plain: {plain}, dark: {transform}}}", dtype="float32")) == (24, 0, 0)
    assert summary(luve(dtype="float32")) == (0, 12, 0)
    store = LatentStore(tmp_path / "store")
    what = recipe(tiny_backbone, variants=("plain", "dark (amount 0.5)"), dtype="float32")
    entries = VideoIndex.from_csv(world).entries
    pairs = find_pair_keys(store, ClipHashes(store.root), entries, what, variant="dark (amount 0.5)").pairs
    video = frames_to_video(read_clip(entries[0].path, 0, 9)).unsqueeze(0) * 0.5
    dark = load_backbone(tiny_backbone).latent_space().encode(video)[0]
    torch.testing.assert_close(store.read(pairs[0].hr_key), dark, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_check_reads_every_latent_and_names_the_damaged(luve, world: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    outcome = luve(check="true")
    assert checked(outcome) == (0, 0, 12, 0)
    assert outcome.code == 0
    luve()
    assert checked(luve(check="true", num_workers=3)) == (12, 0, 0, 0)
    store = LatentStore(tmp_path / "store")
    keys = find(store.root, world, recipe(tiny_backbone)).pairs
    # One is damaged, one cut short, one of before there were digests, one gone.
    damaged, cut, old = (store.path(pair.hr_key) for pair in keys)
    gone = store.path(keys[0].lr_keys[3.0])
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-1])
    old.write_bytes(save({"latents": store.read(keys[2].hr_key)}, metadata={"key": keys[2].hr_key.json}))
    gone.unlink()
    before = {path: path.read_bytes() for path in store.root.glob("??/*")}
    outcome = luve(check="true")
    assert checked(outcome) == (8, 1, 1, 2)
    assert outcome.code == 2
    (line,) = outcome.error_lines
    assert "2 of 11 latents are damaged, the first is " in line
    assert line.count("delete") == 1
    assert "delete these files and run `luve precompute` again" in line
    assert str(damaged) in outcome.out
    assert str(cut) in outcome.out
    assert {path: path.read_bytes() for path in store.root.glob("??/*")} == before
    damaged.unlink()
    cut.unlink()
    assert summary(luve()) == (3, 9, 0), "those of before are found, not made again"
    assert checked(luve(check="true")) == (11, 1, 0, 0)
    VideoIndex.from_csv(world).entries[0].path.unlink()
    outcome = luve(check="true")
    assert checked(outcome) == (7, 1, 0, 0)
    folder = store.path(keys[1].lr_keys[2.0])
    folder.unlink()
    folder.mkdir()
    outcome = luve(check="true")
    assert checked(outcome) == (6, 1, 0, 0), "what cannot be read may be sound"
    assert re.search(r"^  unreadable +1$", outcome.out, re.MULTILINE)
    assert outcome.code == 2
    (line,) = outcome.error_lines
    assert line.endswith(f"1 of 8 latents cannot be read, the first is {folder}: Is a directory")


def checked(outcome: Outcome) -> tuple[int, int, int, int]:
    """Sound, without sha256, missing, damaged."""
    numbers = {
        name: int(re.search(rf"^  {name} +(\d+)", outcome.out, re.MULTILINE)[1])  # type: ignore[index]
        for name in ("sound", "without sha256", "missing", "damaged")
    }
    sound, untold, missing, damaged = numbers.values()
    return sound, untold, missing, damaged


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("size", "[50, 48]", "not height 50 (nearest 48 or 96)"),
        ("frames", 8, "8 frames: expected 4k + 1, nearest are 5 and 9"),
        ("scales", "[0.5]", "scales must be different numbers above 1"),
        ("scales", "[0]", "scales must be different numbers above 1"),
        ("scales", "[2, 2.0]", "scales must be different numbers above 1"),
        ("windows", 0, "expected frames, windows, stride >= 1"),
        ("batch_size", 0, "expected batch_size >= 1"),
        ("backbone", "./nothing", "backbone ./nothing: "),
        ("index", "nothing.csv", "nothing.csv"),
        ("dtype", "float8", "dtype"),
        ("trainer.logger", "true", "trainer: logger cannot be set here; known: accelerator,"),
        ("trainer.devises", "2", "trainer: devises cannot be set here"),
        ("batchsize", "2", "batchsize"),
        ("hardware", "abacus", "hardware: expected one of"),
        ("fps", "0", "fps: expected frames a second above 0, or null, got 0"),
        ("keep", "null", "keep: expected Limits, got null"),
        ("store", __file__, f"store: {__file__} is not a folder"),
    ],
)
def test_mistakes_are_one_line(luve, option: str, value: object, message: str) -> None:
    outcome = luve(**{option: value})
    assert outcome.code == 2
    (line,) = outcome.error_lines
    assert message in line


@pytest.mark.slow
def test_latents_beyond_float16_are_refused_in_one_line(luve, tiny_backbone: Path, tmp_path: Path) -> None:
    backbone = write_backbone(tmp_path / "loud", seed=0, latents_std=1e-7)
    outcome = luve(backbone=backbone)
    assert outcome.code == 2
    (line,) = outcome.error_lines
    assert "store them as float32" in line
    assert summary(luve(backbone=backbone, dtype="float32")) == (12, 0, 0)


def test_what_it_took_is_written_on_request(luve, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    assert summary(luve(measured=path, batch_size=1)) == (12, 0, 0)
    found = json.loads(path.read_text())
    assert {key: found[key] for key in ("unit", "done", "units", "total", "made", "there", "processes")} == {
        "unit": "clip",
        "done": 3,
        "units": 3,
        "total": 12,
        "made": 12,
        "there": 0,
        "processes": 1,
    }
    assert found["seconds_per_unit"] > 0
    assert found["bytes"] > 0
    luve(measured=path)
    found = json.loads(path.read_text())
    assert (found["done"], found["made"], found["there"], found["seconds_per_unit"]) == (0, 0, 12, None)
