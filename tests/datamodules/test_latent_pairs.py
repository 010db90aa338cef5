"""Aligned crops of latents at two resolutions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from luve_lightning.data.clips import read_clip
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.latent_store import LatentRecipe, LatentStore
from luve_lightning.data.store import StoreError
from luve_lightning.data.video_index import VideoIndex
from luve_lightning.datamodules import LatentPairsDataModule
from luve_lightning.functional.pixels import frames_to_video
from luve_lightning.models.backbones import load_backbone
from tests.helpers.small_world import write_world

SCALES = [1.5, 2.0, 3.0]


def module(
    world: Path,
    store: Path,
    backbone: Path,
    preload: bool = False,
    crop: int = 6,
    scales: tuple[float, ...] = tuple(SCALES),
    **changes: Any,
) -> LatentPairsDataModule:
    return LatentPairsDataModule(
        index=world / "clips.csv",
        store=store,
        backbone=str(backbone),
        size=(48, 48),
        scales=list(scales),
        frames=9,
        crop=(3, crop, crop),
        preload=preload,
        **changes,
    )


def test_a_batch_has_one_scale(tiny_clips: Path, tiny_latents: Path, tiny_backbone: Path) -> None:
    data = module(tiny_clips, tiny_latents, tiny_backbone)
    data.setup("fit")
    seen = set()
    loader = data.train_dataloader()
    for epoch in range(6):
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        for batch in loader:
            (scale,) = set(batch["scale"].tolist())
            assert batch["hr"].shape[-1] == scale * batch["lr"].shape[-1]
            seen.add(scale)
    assert seen == set(SCALES)


def test_a_batch_travels_as_it_is_stored_and_is_float32_where_it_is_used(
    tiny_clips: Path, tiny_latents: Path, tiny_backbone: Path
) -> None:
    data = module(tiny_clips, tiny_latents, tiny_backbone)
    data.setup("fit")
    loader = data.train_dataloader()
    keys = next(iter(loader.batch_sampler))  # type: ignore[arg-type]
    batch = next(iter(loader))
    used = data.on_after_batch_transfer(batch, 0)
    for name in ("hr", "lr"):
        assert batch[name].dtype == torch.float16
        assert torch.equal(used[name], torch.stack([data.crops[key][name] for key in keys]))
    assert used["clip_id"] == batch["clip_id"]
    (whole, *_) = data.val_dataloader()
    assert data.on_after_batch_transfer(whole, 0)["hr"].dtype == torch.float32


def test_a_batch_has_one_scale_whose_input_is_as_large_at_each(
    tiny_clips: Path, tiny_latents: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = module(tiny_clips, tiny_latents, tiny_backbone, crop=2, crop_at="low", batch_size=2, passes=12)
    data.setup("fit")
    shapes = {}
    for batch in data.train_dataloader():
        (scale,) = set(batch["scale"].tolist())
        shapes[scale] = tuple(batch["lr"].shape), tuple(batch["hr"].shape)
    assert shapes == {
        scale: ((2, 16, 3, 2, 2), (2, 16, 3, side, side)) for scale, side in ((1.5, 3), (2.0, 4), (3.0, 6))
    }
    assert data.grids("train") == [((3, 2, 2), (3, side, side)) for side in (3, 4, 6)]
    assert data.grids("val") == [((3, side, side), (3, 6, 6)) for side in (4, 3, 2)]
    assert "asked for" not in capsys.readouterr().err


def test_crops_larger_than_the_clips_are_cut_and_said(
    tiny_clips: Path, tiny_latents: Path, tiny_backbone: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = module(tiny_clips, tiny_latents, tiny_backbone, crop=4, crop_at="low")
    with caplog.at_level("INFO"):
        data.setup("fit")
    told = [line for line in caplog.messages if "asked for" in line]
    assert told == [
        "crops at 2x: 3 x 6 x 6 high-resolution latents of 3 x 8 x 8 asked for",
        "crops at 3x: 3 x 6 x 6 high-resolution latents of 3 x 12 x 12 asked for",
    ]
    assert data.grids("train") == [((3, side, side), (3, 6, 6)) for side in (4, 3, 2)]


def test_missing_latents_are_one_clear_line(tiny_clips: Path, tmp_path: Path, tiny_backbone: Path) -> None:
    with pytest.raises(StoreError, match="run `luve precompute`") as error:
        module(tiny_clips, tmp_path / "empty", tiny_backbone).setup("fit")
    assert "\n" not in str(error.value)


def test_pixels_are_those_of_latents_made_at_a_frame_rate(tmp_path: Path, tiny_backbone: Path) -> None:
    """Clips of 16 frames a second read at 8: whole videos and the windows of crops take every other frame."""
    index = write_world(tmp_path, 2, frames=18)
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["source-0"], "val": ["source-1"], "test": []}))
    store, hashes = LatentStore(tmp_path / "store"), ClipHashes(tmp_path / "store")
    vae = load_backbone(tiny_backbone).latent_space().fingerprint()
    recipe = LatentRecipe(vae, (48, 48), (2.0,), frames=9, fps=8)
    entries = VideoIndex.from_csv(index).entries
    for entry in entries:
        for key in recipe.keys(hashes.digest(entry.path), (0, 9)).values():
            store.write(key, torch.zeros(16, 3, key.size[0] // 8, key.size[1] // 8))
    options: dict[str, Any] = {"crop": 6, "scales": (2.0,), "crop_frames": "first", "video_crop": (2, 6, 6)}
    data = module(tmp_path, store.root, tiny_backbone, fps=8, batch_size=1, **options)
    data.setup("fit")
    train, val = ({entry.url: entry for entry in entries}[f"source-{n}"] for n in (0, 1))
    (batch,) = data.val_dataloader()
    torch.testing.assert_close(batch["video"][0], frames_to_video(read_clip(val.path, 0, 9, stride=2)))
    (batch,) = data.train_dataloader()
    torch.testing.assert_close(batch["video"][0], frames_to_video(read_clip(train.path, 0, 5, stride=2)))
    with pytest.raises(StoreError, match="1 of 1 clip has no latents"):
        module(tmp_path, store.root, tiny_backbone, **options).setup("fit")


def test_a_crop_that_no_scale_divides_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="crop: height and width must be multiples of 2 for scale 2"):
        module(tmp_path, tmp_path, tmp_path, crop=3)
    with pytest.raises(ValueError, match=r"multiples of 2 for scale 1\.5, got \(3, 3, 3\)"):
        module(tmp_path, tmp_path, tmp_path, crop=3, crop_at="low")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_frames": "random"}, "video_crop: expected crop_frames: first, got random: without a clip's first"),
        ({"video_crop": (0, 2, 2)}, r"video_crop: expected three extents >= 1, got \(0, 2, 2\)"),
        ({"variants": ("plain", "zoom")}, r"video_crop: expected variants: \[plain\], .* got \['plain', 'zoom'\]"),
    ],
)
def test_pixels_that_do_not_belong_to_the_latents_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    options = {"crop_frames": "first", "video_crop": (2, 2, 2)} | changes
    with pytest.raises(ValueError, match=message):
        module(tmp_path, tmp_path, tmp_path, **options)
