"""The kernel distance against its definition, and free of the bias that the Fréchet distance has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from luve_lightning.evaluation.bootstrap import KernelBootstrap, KernelTarget
from luve_lightning.functional.patches import FrechetTarget
from luve_lightning.metrics.feature_moments import FeatureMoments


def drawn(seed: int, videos: int, shift: float = 0.0, dim: int = 8) -> list[Tensor]:
    """One to three features of each video."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1 + i % 3, dim, generator=generator) + shift for i in range(videos)]


def test_it_is_the_mean_over_pairs_of_different_videos() -> None:
    first, second = drawn(0, 4), drawn(1, 5, 0.5)

    def mean(one: list[Tensor], other: list[Tensor], same: bool) -> float:
        values = [
            float((x.double() @ y.double() / 8 + 1) ** 3)
            for a, rows in enumerate(one)
            for b, others in enumerate(other)
            if not (same and a == b)
            for x in rows
            for y in others
        ]
        return sum(values) / len(values)

    want = mean(first, first, True) + mean(second, second, True) - 2 * mean(first, second, False)
    assert KernelBootstrap(first, KernelTarget(second), 0, 1).value == pytest.approx(want, rel=1e-9)


def test_fewer_videos_do_not_make_it_larger() -> None:
    """Videos of the reference's own distribution: on average 0, while the Fréchet distance grows as they get fewer."""
    reference = drawn(10, 150)
    target, moments = KernelTarget(reference), FeatureMoments.from_features(torch.cat(reference))
    gaussian = FrechetTarget.of(moments.mean(), moments.cov())
    kernel, frechet = {}, {}
    for videos in (6, 24, 96):
        sets = [drawn(1000 * videos + i, videos) for i in range(16)]
        values = np.array([KernelBootstrap(one, target, 0, 1).value for one in sets])
        kernel[videos] = abs(values.mean()) / (values.std() / len(sets) ** 0.5)
        found = [FeatureMoments.from_features(torch.cat(one)) for one in sets]
        frechet[videos] = np.mean([gaussian.distance(one.mean(), one.cov()) for one in found])
    assert max(kernel.values()) < 3  # standard errors from 0
    assert frechet[6] > 2 * frechet[24] > 3 * frechet[96]


def test_its_interval_holds_the_distance_of_many_videos() -> None:
    target = KernelTarget(drawn(10, 100))
    truth = KernelBootstrap(drawn(11, 400, 0.4), target, 0, 1).value
    intervals = [KernelBootstrap(drawn(50 + i, 40, 0.4), target, i, 100).interval() for i in range(20)]
    assert sum(one.low < truth < one.high for one in intervals) >= 16
    assert all(one.low < one.value < one.high and one.n == 40 for one in intervals)


def test_two_methods_are_compared_on_the_same_draws() -> None:
    target = KernelTarget(drawn(10, 100))
    near, far = drawn(20, 30), [rows + 0.3 for rows in drawn(20, 30)]
    first, second = (KernelBootstrap(one, target, 3, 100) for one in (far, near))
    found = first.difference(second)
    assert found.value == pytest.approx(first.value - second.value)
    assert 0 < found.low < found.value < found.high
    with pytest.raises(ValueError, match="got 30 and 29"):
        first.difference(KernelBootstrap(near[1:], target, 3, 100))


def test_one_video_has_no_distance() -> None:
    with pytest.raises(ValueError, match="1 video: a kernel distance needs at least 2"):
        KernelBootstrap(drawn(0, 1), KernelTarget(drawn(1, 3)), 0, 1)
    with pytest.raises(ValueError, match="1 videos of the reference"):
        KernelTarget(drawn(0, 1))
