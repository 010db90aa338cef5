"""Aligned crops of latents at two resolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luve_lightning.data.store import StoreError
from luve_lightning.datamodules import LatentPairsDataModule

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
