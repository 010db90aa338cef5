"""Looking up the pairs that training wants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from luve_lightning.data.clip_container import ClipError
from luve_lightning.data.clip_windows import PairLookup, find_pair_keys, quarantine_path
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.latent_store import LatentRecipe, LatentStore
from luve_lightning.data.quarantine import Quarantine
from luve_lightning.data.store import StoreError
from luve_lightning.data.video_index import ClipEntry, VideoIndex
from tests.helpers.small_world import write_world

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


def test_other_vae_other_size_other_frames_are_not_found(store: LatentStore, entries: list[ClipEntry]) -> None:
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
