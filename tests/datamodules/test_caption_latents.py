"""Latents with captions from the tiny world's stores: what each split holds, and what is refused."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from luve_lightning.data.clip_scores import ScoreRow, ScoreSettings, write_rows
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.text_store import TextStore
from luve_lightning.data.video_index import VideoIndex
from luve_lightning.datamodules.caption_latents import Selection
from luve_lightning.files import text_digest
from tests.helpers.tiny_flow import World

COLUMN = "Summarized Description"


def entries(world: World, split: Any) -> list[Any]:
    return VideoIndex.from_csv(world.clips / "clips.csv").split(split)


@pytest.mark.parametrize(("scale", "side"), [(1, 6), (1.5, 4), (3, 2)])
def test_splits_sizes_and_embeddings(world: World, scale: float, side: int) -> None:
    data = world.data(scale=scale, batch_size=3)
    data.setup("fit")
    data.setup("test")
    assert {split: len(d) for split, d in data.datasets.items()} == {"train": 4, "val": 1, "test": 1}
    (batch,) = data.val_dataloader()
    assert batch["latents"].shape == (1, 16, 3, side, side)
    assert batch["clip_id"] == [f"{entries(world, 'val')[0].clip_id}@0"]
    store = TextStore(world.texts)
    want = store.read(store.source().key(entries(world, "val")[0].captions[COLUMN]))
    assert torch.equal(batch["text"][0], want)
    seen = [clip for batch in data.train_dataloader() for clip in batch["clip_id"]]
    known = [f"{entry.clip_id}@0" for entry in entries(world, "train")]
    assert len(seen) == 6, "two passes over four clips hold two whole batches of three"
    assert set(seen[:4]) == set(known), "each clip once before any twice"


def test_captions_come_as_text_without_a_store(world: World) -> None:
    data = world.data(texts=None, drop_caption=1.0)
    data.setup("fit")
    assert {c for batch in data.train_dataloader() for c in batch["caption"]} == {""}
    (batch,) = data.val_dataloader()
    assert batch["caption"] == ["Coloured squares drift to the left."], "held-out captions are never dropped"
    assert "text" not in batch


def test_uncaptioned_versions_are_seen_as_often_as_captioned_ones(world: World) -> None:
    data = world.data(texts=None, drop_caption=0.0, uncaptioned=("plain", "plain"), passes=1, batch_size=1)
    data.setup("fit")
    seen = [(batch["clip_id"][0], batch["caption"][0] == "") for batch in data.train_dataloader()]
    clips = [f"{entry.clip_id}@0" for entry in entries(world, "train")]
    assert sorted(seen) == sorted([(clip, silent) for clip in clips for silent in (True, False)] * 2)
    (batch,) = data.val_dataloader()
    assert batch["caption"] == [entries(world, "val")[0].captions[COLUMN]]
    with pytest.raises(ValueError, match="for variant odd, "):
        world.data(uncaptioned=("odd",)).setup("fit")


def test_limits_and_seeds(world: World, tmp_path: Path) -> None:
    swapped = world.resplit(tmp_path / "world", train="val", val="train", test="test")
    data = swapped.data(val_limit=3)
    data.setup("validate")
    assert [d["clip_id"] for d in data.datasets["val"]] == [f"{e.clip_id}@0" for e in entries(world, "train")[:3]]  # type: ignore[attr-defined]  # fmt: skip
    orders = []
    for seed in (0, 0, 1):
        data = world.data(seed=seed, passes=8, batch_size=1)
        data.setup("fit")
        orders.append([batch["clip_id"] for batch in data.train_dataloader()])
    assert orders[0] == orders[1] != orders[2]


def write_scores(world: World, folder: Path, scores: list[float]) -> Path:
    settings = ScoreSettings("sharpness", "1", COLUMN, "4 frames")
    hashes = ClipHashes(folder)
    rows = [
        ScoreRow(
            entry.clip_id,
            hashes.digest(entry.path),
            text_digest(entry.captions[COLUMN]),
            settings,
            (0,),
            (score,),
            score,
        )
        for entry, score in zip(entries(world, "train"), scores, strict=True)
    ]
    write_rows(folder / "part-0.parquet", rows)
    return folder


def test_training_clips_are_selected_and_held_out_ones_are_not(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = Selection(write_scores(world, tmp_path, [1.0, 3.0, 2.0, 2.5]), "sharpness", 2.0)
    data = world.data(selection=chosen)
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)  # Lightning's logs do not reach the root
    with caplog.at_level("INFO", logger.name):
        data.setup("fit")
    logger.removeHandler(caplog.handler)
    kept = [entry.clip_id for entry, _ in data.datasets["train"].items]
    assert kept == [entries(world, "train")[i].clip_id for i in (1, 3)]
    assert len(data.datasets["val"]) == 1, "it has no score and needs none"
    assert set(caplog.messages) == {
        f"{data.index_path}: 6 clips of 3 source videos, 0 rows dropped",
        "training clips: 2 of 4 clips are above 2 by sharpness (1)",
    }
    with pytest.raises(ValueError, match="scores by 'sharpness', but the threshold 2 is for 'hpsv3'"):
        world.data(selection=replace(chosen, scorer="hpsv3")).setup("fit")
    with pytest.raises(ValueError, match="none of 4 clips is above 9 by sharpness; the highest has 3"):
        world.data(selection=replace(chosen, threshold=9.0)).setup("fit")
    with pytest.raises(FileNotFoundError, match="nowhere: no scores; `luve score` makes them"):
        world.data(selection=replace(chosen, scores=Path("nowhere"))).setup("fit")


def test_a_missing_embedding_is_found_before_training(world: World, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    shutil.copytree(world.texts, texts)
    store = TextStore(texts)
    path = store.path(store.source().key(""))
    path.unlink()
    message = 'has no embedding of caption "" by text encoder .*run `luve embed`'
    with pytest.raises(ValueError, match=message):
        world.data(texts=texts).setup("fit")
    world.data(texts=texts, drop_caption=0.0).setup("fit")
    world.data(texts=texts).setup("test")
    with pytest.raises(ValueError, match=r"no such embeddings for encoder abc, .* there are: "):
        world.data(text_encoder="abc").setup("test")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_limit": 0}, "val_limit: expected at least 1 clip, or null for all, got 0"),
        ({"test_limit": -1}, "test_limit: expected at least 1 clip, or null for all, got -1"),
        (
            {"variant": "sharpened (radius 9.0, amount 1.0)"},  # the experiments make others
            "for variant sharpened .*size 48x48, scales none",
        ),
        ({"scale": 4.0}, "4 of 4 clips have no latents in .* scales 4, 9 frames from 0 .*run `luve precompute`"),
        ({"scale": 0.5}, r"scales must be different numbers above 1, got \[0.5\]"),
        ({"columns": ("Title",)}, "columns: 'Title' is no caption column"),
        ({"drop_caption": 1.5}, r"drop: expected a chance in \[0, 1\], got 1.5"),
        ({"seed": -1}, "seed >= 0; got 2, 0, -1"),
    ],
)
def test_mistakes_are_one_line(world: World, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        world.data(**changes).setup("fit")
    assert "\n" not in str(error.value)


def test_low_resolution_latents_come_with_the_others(world: World) -> None:
    """Each clip's own, as another module reads them at that scale; nothing else of a batch changes."""
    alone = {
        scale: {
            clip: latents
            for batch in loaded(world.data(scale=scale, batch_size=1, passes=1))
            for clip, latents in zip(batch["clip_id"], batch["latents"], strict=True)
        }
        for scale in (1, 1.5, 2)
    }
    for scale, low in ((1, 2), (1.5, 2), (1, 1.5)):
        both = loaded(world.data(scale=scale, low_scale=low, low_variant="plain", preload=True))
        assert [b["clip_id"] for b in both] == [b["clip_id"] for b in loaded(world.data(scale=scale))]
        for batch in both:
            for clip, high, lower in zip(batch["clip_id"], batch["latents"], batch["low"], strict=True):
                assert torch.equal(high, alone[scale][clip])
                assert torch.equal(lower, alone[low][clip])
    with pytest.raises(ValueError, match=r"low_scale: expected a scale above 2, the scale, got 1\.5"):
        world.data(scale=2, low_scale=1.5)
    with pytest.raises(ValueError, match="low_variant: expected low_scale, too"):
        world.data(low_variant="plain")
    with pytest.raises(ValueError, match="for variant blurred, "):
        world.data(low_scale=2, low_variant="blurred").setup("fit")


def loaded(data: Any) -> list[Any]:
    data.setup("fit")
    return list(data.train_dataloader())
