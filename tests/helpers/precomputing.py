"""`luve precompute` in the test process on a small world, and what a test looks for in its store."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from luve_lightning.data.clip_windows import PairLookup, find_pair_keys
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.latent_store import LatentRecipe, LatentStore
from luve_lightning.data.video_index import VideoIndex
from luve_lightning.models.backbones import load_backbone
from tests.helpers.run_luve import Outcome, run_luve

SCALES = (1.5, 2.0, 3.0)


def precompute(capsys: pytest.CaptureFixture[str], **options: object) -> Outcome:
    """Runs the verb; keyword arguments replace or add options."""
    given: dict[str, object] = {"size": "[48, 48]", "scales": "[1.5, 2, 3]", "frames": 9, "batch_size": 2}
    given |= {"trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false"} | options
    return run_luve(capsys, "precompute", *(f"--{name}={value}" for name, value in given.items()))


def on_world(capsys: pytest.CaptureFixture[str], world: Path, backbone: Path, folder: Path) -> Callable[..., Outcome]:
    """Runs the verb on a world, into `folder/store`; keyword arguments replace or add options."""
    return partial(precompute, capsys, backbone=backbone, index=world, store=folder / "store")


def summary(outcome: Outcome) -> tuple[int, int, int]:
    """Encoded, already there, quarantined."""
    assert outcome.code == 0, outcome.err
    rows = dict(line.strip().split(None, 1) for line in outcome.out.splitlines() if line.startswith("  "))
    return (int(rows["encoded"].split()[0]), int(rows["already"].split()[-1]), int(rows["quarantined"].split(",")[0]))


def recipe(backbone: Path, **changes: object) -> LatentRecipe:
    values = {"vae": load_backbone(backbone).latent_space().fingerprint(), "size": (48, 48), "scales": SCALES}
    return LatentRecipe(**{**values, "frames": 9, **changes})  # type: ignore[arg-type]


def find(store: Path, index: Path, what: LatentRecipe) -> PairLookup:
    return find_pair_keys(LatentStore(store), ClipHashes(store), VideoIndex.from_csv(index).entries, what)
