"""What all datamodules do: share held-out items among processes, and say which split is empty."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from luve_lightning.data.index_file import IndexRow, read_rows, write_index
from luve_lightning.data.store import StoreError
from luve_lightning.data.video_index import VideoIndex
from luve_lightning.datamodules import CaptionLatentsDataModule, ClipsDataModule, LatentPairsDataModule, base
from luve_lightning.datamodules.base import ResumableDataModule
from luve_lightning.datamodules.clips import View
from tests.helpers.processes import run_processes
from tests.helpers.resumable import Run
from tests.helpers.run_luve import run_luve
from tests.helpers.tiny_flow import World, train_without_latents, validate_sharded
from tests.test_experiments import (
    EXPERIMENTS,
    as_options,
    documented_command,
    overlays,
    tiny_environment,  # noqa: F401
)


@pytest.fixture
def only_train(tiny_clips: Path, tmp_path: Path) -> Path:
    """The tiny world with every source video in the training split; returns its CSV."""
    world = tmp_path / "only_train"
    world.mkdir()
    (world / "clips").symlink_to(tiny_clips / "clips")
    shutil.copy(tiny_clips / "clips.csv", world)
    urls = [url for split in json.loads((tiny_clips / "splits.json").read_text()).values() for url in split]
    (world / "splits.json").write_text(json.dumps({"train": urls, "val": [], "test": []}))
    return world / "clips.csv"


@pytest.fixture
def own_index(only_train: Path) -> Path:
    """The same as an index of one's own."""
    index = VideoIndex.open(only_train)
    path = only_train.with_name("index.parquet")
    write_index(path, [IndexRow(entry.path.resolve(), entry) for entry in index.entries])
    return path


def make(number: int, index: Path, store: Path, backbone: Path, **changes: Any) -> ResumableDataModule:
    """One of the three DataModules."""
    stored: dict[str, Any] = {"index": index, "store": store, "backbone": str(backbone), "size": (48, 48)}
    kinds: tuple[tuple[type[ResumableDataModule], dict[str, Any]], ...] = (
        (LatentPairsDataModule, {**stored, "frames": 9, "scales": [2.0], "crop": (1, 2, 2)}),
        (CaptionLatentsDataModule, {**stored, "frames": 9}),
        (ClipsDataModule, {"index": index, "views": {"x1": View(frames=5, size=16)}, "val_frames": 5}),
    )
    kind, values = kinds[number]
    return kind(**values, **changes)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize(("stage", "split"), [("validate", "val"), ("test", "test"), ("fit", "val")])
def test_an_empty_split_is_said_with_the_others(
    only_train: Path, tiny_latents: Path, tiny_backbone: Path, number: int, stage: str, split: str
) -> None:
    module = make(number, only_train, tiny_latents, tiny_backbone)
    with pytest.raises(
        ValueError, match=f"^the split {split} of {only_train} is empty: 6 train, 0 val, 0 test; "
    ) as info:
        module.setup(stage)
    assert "splits.json" in str(info.value)
    assert ("limit_val_batches 0" in str(info.value)) == (split == "val")


@pytest.mark.slow
def test_training_needs_no_validation_clips(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    only_train: Path,
    tiny_environment: Path,  # noqa: F811
) -> None:
    verb, files = documented_command(EXPERIMENTS / "vluer" / "mini.yaml")
    words = [verb, *as_options([*files, *overlays(verb, files)])]
    monkeypatch.setenv("TINY_WORLD", str(only_train.parent))
    refused = run_luve(capsys, *words)
    assert refused.code == 2
    assert "the split val of" in refused.err
    trained = run_luve(capsys, *words, "--trainer.limit_val_batches", 0)
    assert trained.code == 0, trained.err
    assert (tiny_environment / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize("number", range(3))
def test_an_index_of_ones_own_trains_without_validation(
    own_index: Path, tiny_latents: Path, tiny_backbone: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(base, "rank_zero_info", told.append)
    module = make(number, own_index, tiny_latents, tiny_backbone)
    module.setup("fit")
    assert module.clip_counts() == {"train": 6}
    lines = [line for line in told if line.startswith("training goes on without validation: ")]
    counts = f"the split val of {own_index} is empty: 6 train, 0 val, 0 test"
    assert lines == [
        f"training goes on without validation: {counts}; give its source videos in a file for luve index --splits"
    ]
    before = len(told)
    assert module.open_held_out() == "train"
    assert len(told) == before, "the index is not opened again"
    module = make(number, own_index, tiny_latents, tiny_backbone)
    with pytest.raises(ValueError, match=f"^the split test of {own_index} is empty"):
        module.setup("test")


@pytest.mark.parametrize("number", range(2))
def test_validation_clips_that_are_all_too_short_are_none(
    own_index: Path, tiny_latents: Path, tiny_backbone: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(base, "rank_zero_info", told.append)
    first, *others = read_rows(own_index)
    assert first.entry is not None
    entry = replace(first.entry, total_frames=4, url="short")
    write_index(own_index, [IndexRow(first.path, entry, "val"), *others])
    module = make(number, own_index, tiny_latents, tiny_backbone)
    module.setup("fit")
    assert module.clip_counts() == {"train": 5}
    (line,) = [line for line in told if line.startswith("training goes on without validation: ")]
    assert f"none of 1 clip has latents in {tiny_latents}" in line
    assert f"first {entry.clip_id}: 4 frames, expected at least 9" in line
    validating = make(number, own_index, tiny_latents, tiny_backbone)
    validating.trainer = SimpleNamespace(state=SimpleNamespace(fn="validate"), global_rank=0)  # type: ignore[assignment]
    with pytest.raises(StoreError, match="none of 1 clip has latents"):
        validating.setup("validate")


@pytest.mark.slow
def test_a_run_on_an_index_of_ones_own_without_validation(
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    own_index: Path,
    tiny_environment: Path,  # noqa: F811
) -> None:
    verb, files = documented_command(EXPERIMENTS / "vluer" / "mini.yaml")
    words = [verb, *as_options([*files, *overlays(verb, files)]), "--data.init_args.index", own_index]
    trained = run_luve(
        capsys, *words, "--trainer.num_sanity_val_steps", 2, "--callbacks.strips.init_args.every_n_steps", 1
    )
    assert trained.code == 0, trained.err
    assert caplog.text.count("training goes on without validation: the split val of") == 1
    assert (tiny_environment / "checkpoints" / "last.ckpt").is_file()
    assert "  next " not in trained.out, "nothing to validate or test on"
    refused = run_luve(capsys, "validate", *words[1:])
    assert refused.code == 2
    assert "the split val of" in refused.err


@pytest.mark.parametrize("number", range(3))
def test_a_limit_of_no_clips_is_refused(tiny_clips: Path, tiny_latents: Path, tiny_backbone: Path, number: int) -> None:
    with pytest.raises(ValueError, match=r"^val_limit: expected at least 1 clip, or null for all, got 0$"):
        make(number, tiny_clips / "clips.csv", tiny_latents, tiny_backbone, val_limit=0)


def share(rank: int, world_size: int, items: int) -> list[int]:
    data = ResumableDataModule(batch_size=1, num_workers=0, seed=0)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)  # type: ignore[assignment]
    loader = data.evaluation_loader(TensorDataset(torch.arange(items)))
    return [int(i) for [batch] in loader for i in batch]


@pytest.mark.parametrize(("world_size", "items"), [(1, 5), (2, 6), (2, 5), (3, 3), (3, 2), (4, 1), (5, 3)])
def test_every_item_is_seen_and_no_process_is_idle(world_size: int, items: int) -> None:
    shares = [share(rank, world_size, items) for rank in range(world_size)]
    assert all(shares)
    seen = [i for part in shares for i in part]
    assert sorted(set(seen)) == list(range(items))
    assert len(seen) == max(items, world_size)  # twice only where there are too few


@pytest.mark.parametrize(("ranks", "message"), [((0, 1), "StoreError: "), ((1,), "RankError: rank 1 failed:")])
def test_what_is_missing_is_told_by_one_of_two_processes(
    world: World, tmp_path: Path, ranks: tuple[int, ...], message: str
) -> None:
    run = Run(tmp_path, steps=1, processes=2, task={"world": world, "ranks": ranks})
    assert run_processes(run, train_without_latents) == [1, 0]
    first, second = ((tmp_path / f"output-{rank}.txt").read_text() for rank in (0, 1))
    assert message in first
    assert "have no latents in" in first
    assert "have no latents in" not in second
    assert "Traceback" not in second


@pytest.mark.parametrize("batch_size", [1, 2])
def test_where_the_model_is_sharded_every_process_takes_part_in_each_batch(
    world: World, tmp_path: Path, batch_size: int
) -> None:
    """Three clips, two processes: one that had fewer batches would leave the other waiting for its shards."""
    uneven = world.resplit(tmp_path / "uneven", train="val", val="train", test="test")
    found = []
    for processes in (1, 2):
        run = Run(tmp_path / f"{processes}", processes=processes, task={"world": uneven, "batch_size": batch_size})
        assert run_processes(run, validate_sharded) == [0] * processes
        found.append(json.loads((run.folder / "validation.json").read_text()))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
