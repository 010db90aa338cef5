"""Latents with captions: which caption a sample gets, and how often none."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from luve_lightning.data.latent_store import LatentRecipe, LatentStore
from luve_lightning.data.store import StoreError
from luve_lightning.data.video_index import CAPTIONS, ClipEntry
from luve_lightning.datamodules.caption_latents import CaptionLatents
from luve_lightning.datamodules.sampling import SampleKey

COLUMNS = ("Summarized Description", "Brief Description", "Style")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    return LatentStore(tmp_path_factory.mktemp("store"))


def dataset(store: LatentStore, **changes: Any) -> CaptionLatents:
    """Two clips with two windows each; latents hold the number of the item, captions clip and column."""
    recipe = LatentRecipe("0" * 64, (16, 16), (), frames=5, windows=2)
    items = []
    for number, clip in enumerate("aabb"):
        captions = {column: f"{clip} {column}" for column in CAPTIONS}
        entry = ClipEntry(clip, Path(f"{clip}.mp4"), "url", 16, 9, 48, 48, captions)
        key = recipe.key(clip * 64, recipe.frame_ranges(9)[number % 2])
        store.write(key, torch.full((16, 2, 2, 2), float(number)))
        items.append((entry, key))
    return CaptionLatents(store, items, **({"columns": COLUMNS} | changes))


def keys(count: int, index: int = 2) -> list[SampleKey]:
    return [SampleKey(index, 0, (7, 1, position)) for position in range(count)]


def test_by_index_it_is_the_first_column_and_never_empty(store: LatentStore) -> None:
    items = dataset(store, drop=1.0)
    assert [items[i]["caption"] for i in range(4)] == [f"{c} Summarized Description" for c in "aabb"]
    assert [items[i]["clip_id"] for i in range(4)] == ["a@0", "a@4", "b@0", "b@4"]
    assert [items[i]["latents"].float().mean().item() for i in range(4)] == [0, 1, 2, 3]


def test_without_columns_every_caption_is_empty(store: LatentStore) -> None:
    items = dataset(store, columns=(), drop=0.0)
    assert [items[i]["caption"] for i in range(4)] == [""] * 4
    assert {items[key]["caption"] for key in keys(20)} == {""}


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 1.0])
def test_captions_are_dropped_and_chosen_by_chance(store: LatentStore, drop: float) -> None:
    items = dataset(store, drop=drop)
    counts = Counter(items[key]["caption"] for key in keys(2000))
    dropped = counts.pop("", 0)
    # Four standard deviations of a binomial distribution.
    assert abs(dropped - 2000 * drop) <= 4 * (2000 * drop * (1 - drop)) ** 0.5
    assert set(counts) == (set() if drop == 1 else {f"b {column}" for column in COLUMNS})
    expected = (2000 - dropped) / 3
    assert all(abs(count - expected) <= 4 * expected**0.5 for count in counts.values())


def test_chance_follows_from_the_key_alone(store: LatentStore) -> None:
    """Neither the order of reading nor another setting changes what a sample draws."""
    items, often, one = (
        dataset(store, drop=0.3),
        dataset(store, drop=0.6, preload=True),
        dataset(store, drop=0.3, columns=COLUMNS[:1]),
    )
    forward = [items[key]["caption"] for key in keys(100)]
    assert [items[key]["caption"] for key in reversed(keys(100))] == forward[::-1]
    more = [often[key]["caption"] for key in keys(100)]
    assert all(b in (a, "") for a, b in zip(forward, more, strict=True))
    assert more.count("") > forward.count("")
    fewer = [one[key]["caption"] for key in keys(100)]
    assert [c == "" for c in fewer] == [c == "" for c in forward]


def test_flipped_bits_do_not_get_into_training(tmp_path: Path) -> None:
    store = LatentStore(tmp_path)
    sound = dataset(store)
    path = store.path(sound.items[1][1])
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x80
    path.write_bytes(content)
    with pytest.raises(StoreError, match="sha256 differs"):
        dataset(store, preload=True)
    with pytest.raises(StoreError, match="sha256 differs"):
        sound[1]


def test_preloaded_latents_are_those_of_the_store(store: LatentStore) -> None:
    items, loaded = dataset(store), dataset(store, preload=True)
    for _, key in loaded.items:
        store.path(key).unlink()
    assert [loaded[i]["latents"].float().mean().item() for i in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="has no latents for"):
        items[0]


def test_embeddings_take_the_captions_place(store: LatentStore) -> None:
    asked: list[str] = []

    def embed(caption: str) -> torch.Tensor:
        asked.append(caption)
        return torch.full((4, 8), float(len(caption)))

    items = dataset(store, drop=1.0, embed=embed)
    by_key, by_index = items[keys(1)[0]], items[0]
    assert asked == ["", "a Summarized Description"]
    assert by_key.keys() == by_index.keys() == {"latents", "clip_id", "text"}
    assert by_key["text"].max() == 0
    assert by_index["text"].min() == len(asked[1])


def test_mistakes(store: LatentStore) -> None:
    for drop in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"drop: expected a chance in \[0, 1\], got"):
            dataset(store, drop=drop)
    with pytest.raises(ValueError, match="columns: 'Title' is no caption column; known: Brief Description, "):
        dataset(store, columns=("Style", "Title"))
