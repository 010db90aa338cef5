"""Statistics files: what is kept, and what is refused."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from luve_lightning.functional.patches import PatchPlan
from luve_lightning.metrics.feature_moments import FeatureMoments, FeatureStatistics

PLAN = PatchPlan(size=64, placement="both", per_frame=4, grid=(2, 3))
MOMENTS = FeatureMoments.from_features(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
STATISTICS = FeatureStatistics(MOMENTS, PLAN, "stub-1", "some/folder", "ab" * 32, files=3)


def test_a_file_gives_back_all_that_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "new" / "reference.safetensors"
    STATISTICS.save(path)
    loaded = FeatureStatistics.load(path)
    assert loaded.moments.count == 9
    assert torch.equal(loaded.moments.sum, MOMENTS.sum)
    assert torch.equal(loaded.moments.outer, MOMENTS.outer)
    assert loaded.moments.outer.dtype == torch.float64
    assert replace(loaded, moments=MOMENTS, path="") == STATISTICS
    assert loaded.package == version("luve-lightning")
    loaded.check(PLAN, "stub-1", "ab" * 32)


@pytest.mark.parametrize(
    ("plan", "extractor", "source_hash", "message"),
    [
        (replace(PLAN, size=32), "stub-1", None, "patches.size 64 there and 32 here"),
        (replace(PLAN, placement="grid"), "stub-1", None, "patches.placement both there and grid here"),
        (replace(PLAN, frames=4), "stub-1", None, "patches.frames 8 there and 4 here"),
        (replace(PLAN, per_frame=5), "stub-1", None, "patches.per_frame 4 there and 5 here"),
        (replace(PLAN, grid=None), "stub-1", None, r"patches.grid \(2, 3\) there and None here"),
        (PLAN, "stub-2", None, "extractor stub-1 there and stub-2 here"),
        (PLAN, "stub-1", "cd" * 32, "sha256 abababababab there, cdcdcdcdcdcd now"),
    ],
)
def test_statistics_made_otherwise_are_refused(
    tmp_path: Path, plan: PatchPlan, extractor: str, source_hash: str | None, message: str
) -> None:
    STATISTICS.save(tmp_path / "r.safetensors")
    with pytest.raises(ValueError, match=message) as raised:
        FeatureStatistics.load(tmp_path / "r.safetensors").check(plan, extractor, source_hash)
    assert str(tmp_path / "r.safetensors") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_seed_and_what_a_placement_does_not_use_may_differ() -> None:
    STATISTICS.check(replace(PLAN, seed=9), "stub-1")
    grid = replace(STATISTICS, plan=replace(PLAN, placement="grid"))
    grid.check(replace(PLAN, placement="grid", per_frame=1), "stub-1")
    random = replace(STATISTICS, plan=replace(PLAN, placement="random"))
    random.check(replace(PLAN, placement="random", grid=None), "stub-1")


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "reference.safetensors"
    STATISTICS.save(path)
    before = path.read_bytes()

    def disk_full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        replace(STATISTICS, files=4).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        FeatureStatistics.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("mu, sigma")
    with pytest.raises(ValueError, match=r"text.safetensors: cannot be read"):
        FeatureStatistics.load(tmp_path / "text.safetensors")
    save_file({"sum": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="not a statistics file of format 1"):
        FeatureStatistics.load(tmp_path / "weights.safetensors")


def test_flipped_bits_are_refused_and_files_of_before_the_digest_are_valid(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    STATISTICS.save(path)
    content = path.read_bytes()
    path.write_bytes(bytes([*content[:-1], content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"reference.safetensors: damaged .sha256 differs."):
        FeatureStatistics.load(path)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["luve_feature_statistics"])
    del about["sha256"]
    save_file(
        {"sum": MOMENTS.sum, "outer": MOMENTS.outer}, path, {"luve_feature_statistics": json.dumps(about)}
    )
    assert torch.equal(FeatureStatistics.load(path).moments.outer, MOMENTS.outer)
