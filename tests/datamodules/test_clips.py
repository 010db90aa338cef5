"""Random views of clips, from files and from memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from luve_lightning.data.clips import read_clip
from luve_lightning.data.quarantine import Quarantine
from luve_lightning.data.video_index import VideoIndex
from luve_lightning.datamodules import ClipsDataModule
from luve_lightning.datamodules.clips import ClipViews, View, augmented
from luve_lightning.datamodules.sampling import SampleKey

VIEWS = {"one": View(frames=1, size=32), "half": View(frames=5, size=32, scale=2.0)}


def views(world: Path, preload: bool, augment: bool = False) -> ClipViews:
    entries = VideoIndex.from_csv(world / "clips.csv").split("train")
    return ClipViews(entries, VIEWS, Quarantine(None, 0.0, len(entries)), preload=preload, augment=augment)


@pytest.mark.parametrize("kind", [0, 1])
def test_preloaded_and_read_views_are_the_same(tiny_clips: Path, kind: int) -> None:
    key = SampleKey(index=2, kind=kind, seed=(0, 3, 11))
    read, kept = views(tiny_clips, preload=False)[key], views(tiny_clips, preload=True)[key]
    assert torch.equal(read["video"], kept["video"])
    assert read["video"].shape == (3, (1, 5)[kind], 32, 32)
    assert read["video"].abs().max() <= 1


def test_a_full_scale_view_is_a_window_of_the_clip(tiny_clips: Path) -> None:
    data = views(tiny_clips, preload=False)
    item = data[SampleKey(index=0, kind=0, seed=(1, 0, 0))]
    clip = torch.from_numpy(read_clip(data.entries[0].path, 0, 9)).permute(3, 0, 1, 2) / 127.5 - 1
    windows = clip.unfold(2, 32, 1).unfold(3, 32, 1)  # 3 x 9 x 33 x 33 x 32 x 32
    difference = (windows - item["video"][:, 0, None, None, None]).abs().amax(dim=(0, 4, 5))
    assert difference.min() < 1e-5


def test_views_reach_every_corner_and_both_ends_of_a_clip(tiny_clips: Path) -> None:
    data = views(tiny_clips, preload=False)
    data.views, data.entries[0] = [View(frames=3, size=5)], replace(data.entries[0], total_frames=6)
    # Each pixel holds its own place: frame, row, column.
    data.loaded[0] = np.stack(np.meshgrid(np.arange(6), np.arange(6), np.arange(7), indexing="ij"), -1).astype(np.uint8)
    found = set()
    for n in range(300):
        video = data[SampleKey(index=0, kind=0, seed=(0, 0, n))]["video"]
        assert video.shape == (3, 3, 5, 5)
        found.add(tuple(video[:, 0, 0, 0].add(1).mul(127.5).round().int().tolist()))
    assert found == {(start, top, left) for start in range(4) for top in (0, 1) for left in (0, 1, 2)}


def test_augmentation_keeps_shape_and_is_seeded() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    results = [augmented(frames, np.random.default_rng(i)) for i in range(40)]
    assert all(r.shape == frames.shape and r.dtype == np.uint8 and min(r.strides) > 0 for r in results)
    assert np.array_equal(results[3], augmented(frames, np.random.default_rng(3)))
    assert len({r.tobytes() for r in results}) > 20


def test_a_view_larger_than_the_clip_is_refused(tiny_clips: Path) -> None:
    data = views(tiny_clips, preload=False)
    data.views = [View(frames=1, size=48, scale=2.0)]
    with pytest.raises(ValueError, match=r"is 64x64; a view of size 48 at scale 2\.0 needs 96x96"):
        data[SampleKey(index=0, kind=0, seed=(0, 0, 0))]


def test_unreadable_clips_are_replaced_and_listed(tiny_clips: Path, tmp_path: Path) -> None:
    entries = VideoIndex.from_csv(tiny_clips / "clips.csv").split("train")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(entries[0].path.read_bytes()[:500])
    entries = [replace(entries[0], path=broken), *entries[1:]]
    for preload in (False, True):
        listed = Quarantine(None, 0.5, len(entries))
        data = ClipViews(entries, VIEWS, listed, preload=preload, augment=False)
        item = data[SampleKey(index=0, kind=1, seed=(0, 0, 0))]
        assert item["clip_id"] == entries[1].clip_id
        assert [bad.path for bad in listed.bad()] == [str(broken)]


def test_whole_clips_for_validation(tiny_clips: Path) -> None:
    data = ClipsDataModule(tiny_clips / "clips.csv", VIEWS, val_frames=5)
    data.setup("validate")
    (batch,) = list(data.val_dataloader())
    assert batch["video"].shape == (1, 3, 5, 64, 64)
    assert len(list(data.statistics_dataloader())) == 4
    data.open_splits("train")
    assert len(data.train_views) == 4
    assert data.clip_counts() == {"val": 1, "train": 4}
    without = ClipsDataModule(tiny_clips / "clips.csv", VIEWS, val_frames=5, val_limit=1)
    without.open_splits("train")
    assert without.clip_counts() == {"train": 4}
