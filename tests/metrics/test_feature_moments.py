"""Moments against numpy's."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from luve_lightning.functional.patches import PatchPlan
from luve_lightning.metrics import feature_moments
from luve_lightning.metrics.feature_moments import FeatureMoments, FeatureStatistics, GroupedMoments


def features(seed: int, count: int, dim: int = 5) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + 3


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(0, 7), min_size=1, max_size=5), dim=st.integers(2, 6))
def test_sums_of_parts_have_the_moments_of_the_whole(counts: list[int], dim: int) -> None:
    parts = [features(i, count, dim) for i, count in enumerate(counts)]
    total = sum((FeatureMoments.from_features(part) for part in parts), FeatureMoments.zeros(dim))
    whole = torch.cat(parts).double().numpy()
    assert total.count == len(whole)
    if len(whole) < 2:
        with pytest.raises(ValueError, match=f"^{len(whole)} patches have no covariance: at least 2"):
            total.cov()
        return
    np.testing.assert_allclose(total.mean(), whole.mean(0), rtol=1e-12)
    np.testing.assert_allclose(total.cov(), np.cov(whole, rowvar=False), rtol=1e-9, atol=1e-12)


def test_moments_are_float64_whatever_the_features() -> None:
    half = FeatureMoments.from_features(features(0, 9).bfloat16())
    assert half.sum.dtype == half.outer.dtype == torch.float64
    np.testing.assert_array_equal(half.sum, features(0, 9).bfloat16().double().sum(0))


@pytest.mark.parametrize("kept_bytes", [2**28, 0], ids=["products kept", "features kept"])
def test_weighted_videos_are_repeated_videos(kept_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_moments, "_KEPT_BYTES", kept_bytes)
    videos = [features(i, count) for i, count in enumerate((4, 9, 1, 6))]
    grouped = GroupedMoments(videos)
    for counts in ([1, 1, 1, 1], [0, 3, 2, 0], torch.tensor([2, 0, 0, 5])):
        want = FeatureMoments.from_features(
            torch.cat([video for video, count in zip(videos, counts, strict=True) for _ in range(int(count))])
        )
        got = grouped.weighted(counts)
        assert got.count == want.count
        torch.testing.assert_close(got.sum, want.sum, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got.outer, want.outer, rtol=1e-12, atol=1e-12)
    assert grouped.weighted([0, 0, 0, 0]).count == 0


def test_bad_features_and_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="floating point N x D"):
        FeatureMoments.from_features(torch.zeros(3, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="not finite"):
        FeatureMoments.from_features(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(ValueError, match="5 and 4 dimensions"):
        FeatureMoments.zeros(5) + FeatureMoments.zeros(4)
    with pytest.raises(ValueError, match="no video"):
        GroupedMoments([])
    with pytest.raises(ValueError, match="number of dimensions"):
        GroupedMoments([features(0, 3, 4), features(0, 3, 5)])
    for counts in ([1], [1, -1], [0.5, 0.5]):
        with pytest.raises(ValueError, match="expected 2 counts, each an integer >= 0"):
            GroupedMoments([features(0, 3), features(1, 3)]).weighted(counts)  # type: ignore[arg-type]


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
    loaded.check(PLAN, "stub-1")


@pytest.mark.parametrize(
    ("plan", "extractor", "message"),
    [
        (replace(PLAN, size=32), "stub-1", "patches.size 64 there and 32 here"),
        (replace(PLAN, placement="grid"), "stub-1", "patches.placement both there and grid here"),
        (replace(PLAN, frames=4), "stub-1", "patches.frames 8 there and 4 here"),
        (replace(PLAN, per_frame=5), "stub-1", "patches.per_frame 4 there and 5 here"),
        (replace(PLAN, grid=None), "stub-1", r"patches.grid \(2, 3\) there and None here"),
        (PLAN, "stub-2", "extractor stub-1 there and stub-2 here"),
    ],
)
def test_statistics_made_otherwise_are_refused(tmp_path: Path, plan: PatchPlan, extractor: str, message: str) -> None:
    STATISTICS.save(tmp_path / "r.safetensors")
    with pytest.raises(ValueError, match=message) as raised:
        FeatureStatistics.load(tmp_path / "r.safetensors").check(plan, extractor)
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
    save_file({"sum": MOMENTS.sum, "outer": MOMENTS.outer}, path, {"luve_feature_statistics": json.dumps(about)})
    assert torch.equal(FeatureStatistics.load(path).moments.outer, MOMENTS.outer)
