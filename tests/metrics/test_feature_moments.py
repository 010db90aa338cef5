"""Moments against numpy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning.metrics import feature_moments
from luve_lightning.metrics.feature_moments import FeatureMoments, GroupedMoments


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
