"""Aligned crops of latents at two resolutions."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luve_lightning.data.clip_container import ClipError
from luve_lightning.data.clip_windows import PairLookup, find_pair_keys, quarantine_path
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.latent_recipe import LatentRecipe
from luve_lightning.data.latent_store import LatentStore
from luve_lightning.data.quarantine import Quarantine
from luve_lightning.data.store import StoreError
from luve_lightning.data.video_index import ClipEntry, VideoIndex
from luve_lightning.datamodules import LatentPairsDataModule
from luve_lightning.datamodules.latent_pairs import WholeLatentPairs, aligned_windows
from luve_lightning.datamodules.sampling import SampleKey
from tests.helpers.small_world import write_world

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
    high, low = aligned_windows(
        shape, (crop[0], crop[1] * p, crop[2] * p), scale, np.random.default_rng(seed)
    )
    assert high[0] == low[0]
    for axis in (1, 2):
        assert 0 <= high[axis][0] < high[axis][1] <= shape[axis]
        for a, b in zip(high[axis], low[axis], strict=True):
            assert Fraction(a) == Fraction(scale).limit_denominator(100) * b


def test_every_position_is_drawn() -> None:
    starts = {
        aligned_windows((1, 12, 12), (1, 6, 6), 1.5, np.random.default_rng(i))[0][1][0] for i in range(200)
    }
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


RECIPE = LatentRecipe(vae="0123456789abcdef", size=(48, 48), scales=(1.5, 3.0), frames=5, windows=2)


@pytest.fixture
def entries(tmp_path: Path) -> list[ClipEntry]:
    return list(VideoIndex.from_csv(write_world(tmp_path, 4)).entries)


@pytest.fixture
def store(tmp_path: Path, entries: list[ClipEntry]) -> LatentStore:
    store = LatentStore(tmp_path / "store")
    hashes = ClipHashes(store.root)
    for entry in entries:
        for frames in RECIPE.frame_ranges(entry.total_frames):
            for key in RECIPE.keys(hashes.digest(entry.path), frames).values():
                store.write(key, torch.zeros(2, 1, 1, 1))
    return store


def find(store: LatentStore, entries: list[ClipEntry], recipe: LatentRecipe = RECIPE) -> PairLookup:
    return find_pair_keys(store, ClipHashes(store.root), entries, recipe)


def test_every_window_at_every_scale(store: LatentStore, entries: list[ClipEntry]) -> None:
    lookup = find(store, entries)
    assert lookup.dropped == []
    assert [pair.entry for pair in lookup.pairs] == [entry for entry in entries for _ in range(2)]
    assert [pair.hr_key.frames for pair in lookup.pairs] == [(0, 5), (4, 9)] * 4
    for pair in lookup.pairs:
        assert pair.hr_key.size == (48, 48)
        assert {scale: key.size for scale, key in pair.lr_keys.items()} == {1.5: (32, 32), 3.0: (16, 16)}
        assert store.shape(pair.lr_keys[3.0]) == (2, 1, 1, 1)


def test_fewer_scales_than_stored(store: LatentStore, entries: list[ClipEntry]) -> None:
    lookup = find(store, entries, replace(RECIPE, scales=(3.0,)))
    assert [list(pair.lr_keys) for pair in lookup.pairs] == [[3.0]] * 8


def test_one_missing_entry_is_one_clear_line(store: LatentStore, entries: list[ClipEntry]) -> None:
    store.path(find(store, entries).pairs[5].lr_keys[1.5]).unlink()
    with pytest.raises(StoreError) as error:
        find(store, entries)
    assert str(error.value) == (
        f"1 of 4 clips have no latents in {store.root} (first {entries[2].clip_id}) for size 48x48, scales 1.5, 3, "
        "5 frames from 0 (windows 2, stride 1), VAE 0123456789ab: run `luve precompute` with these values on this "
        "index"
    )


def test_other_vae_other_size_other_frames_are_not_found(
    store: LatentStore, entries: list[ClipEntry]
) -> None:
    for change in ({"vae": "f" * 64}, {"size": (96, 96)}, {"frames": 9}, {"stride": 2}, {"dtype": "float32"}):
        with pytest.raises(StoreError, match="4 of 4 clips have no latents"):
            find(store, entries, replace(RECIPE, **change))


def test_changed_clip_is_not_found(store: LatentStore, entries: list[ClipEntry]) -> None:
    entries[1].path.write_bytes(entries[1].path.read_bytes() + b"\0")
    with pytest.raises(StoreError, match=f"1 of 4 clips .*first {entries[1].clip_id}"):
        find(store, entries)


def test_known_bad_clip_is_dropped_until_it_is_replaced(store: LatentStore, entries: list[ClipEntry]) -> None:
    bad = entries[1]
    bad.path.write_bytes(b"broken")
    Quarantine(quarantine_path(store, RECIPE), 1, 4).add(ClipError(bad.path, "cannot be read: no video"))
    lookup = find(store, entries)
    assert lookup.dropped == [(bad.clip_id, "cannot be read: no video")]
    assert len(lookup.pairs) == 6
    bad.path.write_bytes(b"something else")
    with pytest.raises(StoreError, match="1 of 4 clips"):
        find(store, entries)


def test_missing_file_is_a_clip_without_latents(store: LatentStore, entries: list[ClipEntry]) -> None:
    entries[3].path.unlink()
    with pytest.raises(StoreError, match=f"1 of 4 clips .*first {entries[3].clip_id}"):
        find(store, entries)


def test_short_clip_is_dropped_with_the_reason(store: LatentStore, entries: list[ClipEntry]) -> None:
    entries[0] = replace(entries[0], total_frames=3)
    lookup = find(store, entries)
    assert lookup.dropped == [(entries[0].clip_id, "3 frames, expected at least 5")]
    assert len(lookup.pairs) == 6


def test_nothing_at_all_is_an_error(store: LatentStore, entries: list[ClipEntry]) -> None:
    with pytest.raises(StoreError, match="none of 0 clips has latents"):
        find(store, [])
    with pytest.raises(StoreError, match="none of 4 clips has latents"):
        find(store, [replace(entry, total_frames=1) for entry in entries])


def test_unknown_variant(store: LatentStore, entries: list[ClipEntry]) -> None:
    with pytest.raises(ValueError, match=r"variant 'sharp' is not among the recipe's, \['plain'\]"):
        find_pair_keys(store, ClipHashes(store.root), entries, RECIPE, variant="sharp")
