"""Windows decoded for encoding: what is skipped, what is bad, what is cut."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from luve_lightning.data import clip_windows as encode_clips
from luve_lightning.data import hashes as file_hashes
from luve_lightning.data.clip_windows import ClipWindow, WindowReader, pending_windows, plan_windows
from luve_lightning.data.clips import read_clip
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.latent_store import LatentKey, LatentRecipe, LatentStore
from luve_lightning.data.store import StoreError
from luve_lightning.data.variants import Unchanged, variant_name
from luve_lightning.data.video_index import VideoIndex
from luve_lightning.datamodules.clips import ClipsToEncode
from tests.helpers.recording import Recording
from tests.helpers.small_world import write_world

RECIPE = LatentRecipe(vae="v", size=(48, 48), scales=(1.5,), frames=5, windows=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"), 3, frames=9, height=56, width=64)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WindowReader:
    monkeypatch.setattr(file_hashes, "_SETTLED_NS", 0)  # the clips were written a moment ago
    return WindowReader(RECIPE, LatentStore(tmp_path / "store"), ClipHashes(tmp_path / "store"))


def store_all(reader: WindowReader, window: ClipWindow) -> None:
    digest = reader.hashes.digest(window.clip.path)
    for key in reader.recipe.keys(digest, window.frames).values():
        reader.store.write(key, torch.zeros(1, 1, 1, 1))


def test_plan_has_every_window_and_names_short_clips(world: Path) -> None:
    entries = VideoIndex.from_csv(world).entries
    short = replace(entries[1], total_frames=4)
    windows, errors = plan_windows([entries[0], short, entries[2]], RECIPE)
    assert [(w.clip.clip_id, w.frames) for w in windows] == [
        (entries[n].clip_id, frames) for n in (0, 2) for frames in ((0, 5), (4, 9))
    ]
    assert [(error.path, error.reason) for error in errors] == [(short.path, "4 frames, expected at least 5")]


def test_frames_are_the_middle_of_the_frames_asked_for(world: Path, reader: WindowReader) -> None:
    clip = VideoIndex.from_csv(world).entries[0]
    item = reader(ClipWindow(clip, (4, 9)))
    assert item.error is None
    assert item.missing == reader.recipe.keys(reader.hashes.digest(clip.path), (4, 9))
    assert item.frames is not None
    # 56 x 64 cut to a square.
    np.testing.assert_array_equal(item.frames.numpy(), read_clip(clip.path, 4, 5)[:, :, 4:60])
    assert item.frames.untyped_storage().nbytes() == 5 * 56 * 56 * 3, "the rest must not be kept alive"


def test_stride(world: Path, reader: WindowReader) -> None:
    clip = VideoIndex.from_csv(world).entries[0]
    reader.recipe = replace(RECIPE, stride=2, windows=1)
    item = reader(ClipWindow(clip, (0, 9)))
    assert item.frames is not None
    np.testing.assert_array_equal(item.frames.numpy(), read_clip(clip.path, 0, 9)[::2, :, 4:60])


def test_stored_windows_are_not_decoded(world: Path, reader: WindowReader, monkeypatch: pytest.MonkeyPatch) -> None:
    windows, _ = plan_windows(VideoIndex.from_csv(world).entries, RECIPE)
    assert pending_windows(windows, reader) == list(range(6)), "no hash is known yet"
    store_all(reader, windows[0])
    store_all(reader, windows[3])
    assert pending_windows(windows, reader) == [1, 2, 4, 5]
    decoded = []

    def counted(path: Path, *args: object, **kwargs: object) -> object:
        decoded.append(path)
        return read_clip(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(encode_clips, "read_clip", counted)
    item = reader(windows[0])
    assert (item.missing, item.frames, item.error) == ({}, None, None)
    assert decoded == []
    reader(windows[1])
    assert decoded == [windows[1].clip.path]


def test_window_with_one_missing_scale_is_decoded_for_it(world: Path, reader: WindowReader) -> None:
    window = plan_windows(VideoIndex.from_csv(world).entries, RECIPE)[0][0]
    keys = reader.recipe.keys(reader.hashes.digest(window.clip.path), window.frames)
    reader.store.write(keys["plain", 1.0], torch.zeros(1, 1, 1, 1))
    item = reader(window)
    assert list(item.missing) == [("plain", 1.5)]
    assert item.frames is not None
    assert pending_windows([window], reader) == [0]


def bad_file(path: Path, kind: str) -> None:
    if kind == "missing":
        path.unlink(missing_ok=True)
    else:
        path.write_bytes({"empty": b"", "garbage": b"no video" * 99}[kind])


@pytest.mark.parametrize("kind", ["missing", "empty", "garbage"])
def test_bad_clips_are_items_with_a_reason(tmp_path: Path, world: Path, reader: WindowReader, kind: str) -> None:
    clip = replace(VideoIndex.from_csv(world).entries[0], path=tmp_path / "bad.mp4")
    bad_file(clip.path, kind)
    item = reader(ClipWindow(clip, (0, 5)))
    assert item.frames is None
    assert item.error
    assert "\n" not in item.error


def test_small_and_short_clips_are_items_with_a_reason(world: Path, reader: WindowReader) -> None:
    clip = VideoIndex.from_csv(world).entries[0]
    reader.recipe = replace(RECIPE, size=(96, 48))
    assert reader(ClipWindow(clip, (0, 5))).error == "frames are 56x64, expected at least 96x48"
    reader.recipe = replace(RECIPE, frames=13)  # the index claimed more frames than there are
    assert "9" in str(reader(ClipWindow(clip, (0, 13))).error)


def test_clip_that_changes_while_it_is_read_is_bad(
    tmp_path: Path, world: Path, reader: WindowReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = VideoIndex.from_csv(world).entries[0]
    clip = replace(entry, path=tmp_path / "clip.mp4")
    clip.path.write_bytes(entry.path.read_bytes())

    def replaced(path: Path, *args: object, **kwargs: object) -> object:
        frames = read_clip(path, *args, **kwargs)  # type: ignore[arg-type]
        other = tmp_path / "other"
        other.write_bytes(b"another clip")
        other.replace(path)
        return frames

    monkeypatch.setattr(encode_clips, "read_clip", replaced)
    assert reader(ClipWindow(clip, (0, 5))).error == "changed while it was read"


@pytest.mark.parametrize("workers", [0, 1])
def test_dataset_gives_every_window_once(world: Path, reader: WindowReader, workers: int) -> None:
    windows, _ = plan_windows(VideoIndex.from_csv(world).entries, RECIPE)
    missing = replace(windows[2].clip, path=windows[2].clip.path.with_name("none.mp4"))
    windows[2] = ClipWindow(missing, windows[2].frames)
    dataset = ClipsToEncode(windows, 4, reader, batches=3)
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=lambda batch: batch)
    batches = list(loader)
    assert [len(batch) for batch in batches] == [4, 2, 0]
    items = [item for batch in batches for item in batch]
    assert [item.window for item in items] == windows
    assert [item.error is not None for item in items] == [n == 2 for n in range(6)]
    with pytest.raises(IndexError):
        dataset[3]


def test_variant_names_hold_the_parameters(tmp_path: Path) -> None:
    assert variant_name("plain", Unchanged()) == "plain"
    assert variant_name("dark", Recording(tmp_path / "log", 0.25)) == "dark (amount 0.25)"
    video = torch.zeros(1, 3, 1, 2, 2)
    assert Unchanged()(video) is video


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("dangling", "No such file or directory"),
        ("circle", "Too many levels of symbolic links"),
        ("long", "File name too long"),
        ("folder", "not a file|Is a directory"),
        ("pipe", "not a file"),
        ("forbidden", "Permission denied"),
    ],
)
def test_what_cannot_be_opened_is_an_item_with_a_reason(
    world: Path, reader: WindowReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, reason: str
) -> None:
    entry = VideoIndex.from_csv(world).entries[0]
    path = tmp_path / ("x" * 300 if kind == "long" else "clip.mp4")
    if kind == "dangling":
        path.symlink_to(tmp_path / "nothing")
    elif kind == "circle":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "forbidden":
        path.write_bytes(b"clip")
        monkeypatch.setattr("io.open", _forbidden)  # permissions do not stop root
    window = ClipWindow(replace(entry, path=path), (0, 5))
    assert re.search(reason, reader(window).error or "")
    assert pending_windows([window], reader) == [0]


def _forbidden(path: Path, *rest: object, **more: object) -> object:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_a_store_that_may_not_be_looked_into_is_not_the_clips_fault(
    world: Path, reader: WindowReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise every clip would be set aside as one that cannot be read."""

    def closed(key: LatentKey) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(reader.store.path(key)))

    monkeypatch.setattr(reader.store, "has", closed)
    windows, _ = plan_windows(VideoIndex.from_csv(world).entries, reader.recipe)
    with pytest.raises(StoreError, match=r"\.safetensors: Permission denied$"):
        reader(windows[0])
