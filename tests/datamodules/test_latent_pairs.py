"""Aligned crops of latents at two resolutions."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luve_lightning.data.store import StoreError
from luve_lightning.datamodules import LatentPairsDataModule
from luve_lightning.datamodules.base import SampleKey
from luve_lightning.datamodules.latent_pairs import WholeLatentPairs, aligned_windows

SCALES = [1.5, 2.0, 3.0]


@given(
    scale=st.sampled_from([1.5, 2.0, 3.0, 1.25, 4.0]),
    units=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    crop=st.tuples(st.integers(1, 6), st.integers(1, 8), st.integers(1, 8)),
    frames=st.integers(1, 7),
    seed=st.integers(0, 2**31),
)
def test_windows_cover_the_same_picture(
    scale: float, units: tuple[int, int], crop: tuple[int, int, int], frames: int, seed: int
) -> None:
    p = Fraction(scale).limit_denominator(100).numerator
    shape = (frames, units[0] * p, units[1] * p)
    high, low = aligned_windows(shape, (crop[0], crop[1] * p, crop[2] * p), scale, np.random.default_rng(seed))
    assert high[0] == low[0]
    for axis in (1, 2):
        assert 0 <= high[axis][0] < high[axis][1] <= shape[axis]
        for a, b in zip(high[axis], low[axis], strict=True):
            assert Fraction(a) == Fraction(scale).limit_denominator(100) * b


def test_every_position_is_drawn() -> None:
    starts = {aligned_windows((1, 12, 12), (1, 6, 6), 1.5, np.random.default_rng(i))[0][1][0] for i in range(200)}
    assert starts == {0, 3, 6}


def test_a_crop_that_does_not_align_is_refused() -> None:
    with pytest.raises(ValueError, match="height: a crop of 8 in 24 latents is not a multiple of 3"):
        aligned_windows((3, 24, 24), (3, 8, 8), 1.5, np.random.default_rng(0))


def module(
    world: Path,
    store: Path,
    backbone: Path,
    preload: bool = False,
    crop: int = 6,
    scales: tuple[float, ...] = tuple(SCALES),
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
    )


def test_crops_are_windows_of_the_whole(tiny_clips: Path, tiny_latents: Path, tiny_backbone: Path) -> None:
    data = module(tiny_clips, tiny_latents, tiny_backbone, crop=3, scales=(1.5, 3.0))
    kept = module(tiny_clips, tiny_latents, tiny_backbone, preload=True, crop=3, scales=(1.5, 3.0))
    data.setup("fit")
    kept.setup("fit")
    whole = WholeLatentPairs(data.store, data.pairs["train"], data.scales)
    for bucket, scale in enumerate(data.scales):
        key = SampleKey(index=1, bucket=bucket, seed=(0, 0, 7))
        item, full = data.crops[key], whole[bucket * len(data.pairs["train"]) + 1]
        assert item["clip_id"] == full["clip_id"]
        high, low = aligned_windows((3, 6, 6), (3, 3, 3), scale, np.random.default_rng([0, 0, 7]))
        for name, (t, y, x) in (("hr", high), ("lr", low)):
            assert torch.equal(item[name], full[name][:, slice(*t), slice(*y), slice(*x)])
        assert torch.equal(kept.crops[key]["hr"], item["hr"])
        assert full["video"].shape == (3, 9, 48, 48)


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


def test_missing_latents_are_one_clear_line(tiny_clips: Path, tmp_path: Path, tiny_backbone: Path) -> None:
    with pytest.raises(StoreError, match="run `luve precompute`") as error:
        module(tiny_clips, tmp_path / "empty", tiny_backbone).setup("fit")
    assert "\n" not in str(error.value)


def test_a_crop_that_no_scale_divides_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="crop: height and width must be multiples of 2 for scale 2"):
        module(tmp_path, tmp_path, tmp_path, crop=3)
