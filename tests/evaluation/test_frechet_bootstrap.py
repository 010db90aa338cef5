"""Intervals of Fréchet distances against resamples put together by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from luve_lightning.evaluation.bootstrap import FrechetBootstrap, Originals, draw_counts
from luve_lightning.functional.frechet import FrechetTarget, frechet_distance

VIDEOS, SEED, REPLICATES = 6, 4, 40


def videos(seed: int, shift: float = 0.0, count: int = VIDEOS) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [
        torch.randn(5 + n, 3, generator=random) + shift + torch.randn(3, generator=random)
        for n in range(count)
    ]


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    exact = features.double()
    return exact.mean(0), exact.T.cov()


def drawn(features: list[Tensor], counts: np.ndarray) -> Tensor:
    return torch.cat([f for f, n in zip(features, counts, strict=True) for _ in range(int(n))])


def fixed(reference: Tensor) -> object:
    target = FrechetTarget.of(*gaussian(reference))
    return lambda moments, counts: target.distance(moments.mean(), moments.cov())


def test_resamples_are_those_of_the_videos_themselves() -> None:
    own, reference = videos(0), torch.randn(200, 3, generator=torch.Generator().manual_seed(9))
    result = FrechetBootstrap(own, fixed(reference), SEED, REPLICATES)
    expected = [
        frechet_distance(*gaussian(drawn(own, counts)), *gaussian(reference))
        for counts in draw_counts(VIDEOS, SEED, REPLICATES)
    ]
    assert result.draws == pytest.approx(np.array(expected), rel=1e-9)
    assert result.value == pytest.approx(
        frechet_distance(*gaussian(torch.cat(own)), *gaussian(reference)), rel=1e-9
    )
    shift = result.value - np.mean(expected)
    assert shift < 0, "resamples lie farther away, which is what the shift is for"
    interval = result.interval()
    low, high = np.percentile(expected, [2.5, 97.5]) + shift
    assert (interval.low, interval.high) == pytest.approx((max(low, 0), high), rel=1e-9)
    assert interval.low < interval.value < interval.high


def test_originals_are_drawn_along() -> None:
    own, originals = videos(0, 0.3), videos(1)
    names = [f"clip-{n}" for n in range(VIDEOS)]
    extra = torch.randn(9, 3, generator=torch.Generator().manual_seed(3))
    reference = Originals({**dict(zip(names, originals, strict=True)), "another": extra}, names)
    result = FrechetBootstrap(own, reference.distance, SEED, REPLICATES)
    expected = [
        frechet_distance(*gaussian(drawn(own, n)), *gaussian(torch.cat([drawn(originals, n), extra])))
        for n in draw_counts(VIDEOS, SEED, REPLICATES)
    ]
    assert result.draws == pytest.approx(np.array(expected), rel=1e-8)
    whole = gaussian(torch.cat([*originals, extra]))
    assert result.value == pytest.approx(frechet_distance(*gaussian(torch.cat(own)), *whole), rel=1e-9)


def test_the_difference_of_a_method_and_itself_is_nothing() -> None:
    one, other = (
        FrechetBootstrap(videos(0), fixed(torch.cat(videos(1))), SEED, REPLICATES) for _ in range(2)
    )
    assert (one.difference(other).value, one.difference(other).low, one.difference(other).high) == (0, 0, 0)


def test_a_difference_is_that_of_the_same_resamples() -> None:
    reference = fixed(torch.cat(videos(1)))
    near, far = (FrechetBootstrap(videos(0, shift), reference, SEED, REPLICATES) for shift in (0.1, 2.0))
    difference = far.difference(near)
    draws = far.draws - near.draws
    shift = difference.value - draws.mean()
    assert difference.value == pytest.approx(far.value - near.value)
    assert (difference.low, difference.high) == pytest.approx(
        tuple(np.percentile(draws, [2.5, 97.5]) + shift)
    )
    assert difference.low > 0
    with pytest.raises(ValueError, match="a pair needs the same videos, got 6 and 5"):
        near.difference(FrechetBootstrap(videos(0)[:5], reference, SEED, REPLICATES))


def test_one_video_has_no_interval_and_progress_is_told() -> None:
    told: list[None] = []
    reference = fixed(torch.cat(videos(1)))
    interval = FrechetBootstrap(
        videos(0)[:1], reference, SEED, REPLICATES, lambda: told.append(None)
    ).interval()
    assert math.isnan(interval.low)
    assert interval.value > 0
    assert not told
    FrechetBootstrap(videos(0), reference, SEED, 3, lambda: told.append(None))
    assert len(told) == 3


def test_too_few_patches_are_no_distance() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        FrechetBootstrap([torch.zeros(1, 3)], fixed(torch.cat(videos(1))), SEED, REPLICATES)
