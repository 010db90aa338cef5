"""Clips that all fall into one split: what is empty is said, and training without validation is possible."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from luve_lightning.datamodules import CaptionLatentsDataModule, ClipsDataModule, LatentPairsDataModule
from luve_lightning.datamodules.base import ResumableDataModule
from luve_lightning.datasets.clip_views import View
from tests.helpers.run_luve import run_luve
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


def modules(index: Path, store: Path, backbone: Path) -> list[ResumableDataModule]:
    return [
        LatentPairsDataModule(index, store, str(backbone), (48, 48), [2.0], 9, crop=(1, 2, 2)),
        CaptionLatentsDataModule(index, store, str(backbone), (48, 48), 9),
        ClipsDataModule(index, {"x1": View(frames=5, size=16)}, val_frames=5),
    ]


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize(("stage", "split"), [("validate", "val"), ("test", "test"), ("fit", "val")])
def test_an_empty_split_is_said_with_the_others(
    only_train: Path, tiny_latents: Path, tiny_backbone: Path, number: int, stage: str, split: str
) -> None:
    module = modules(only_train, tiny_latents, tiny_backbone)[number]
    with pytest.raises(
        ValueError, match=f"^the split {split} of {only_train} is empty: 6 train, 0 val, 0 test; "
    ) as info:
        module.setup(stage)
    assert "splits.json" in str(info.value)
    assert ("limit_val_batches 0" in str(info.value)) == (split == "val")


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
