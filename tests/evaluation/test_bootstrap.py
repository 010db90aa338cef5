"""Intervals of means against scipy, a loop and cases counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from luve_lightning.evaluation.bootstrap import (
    FrechetBootstrap,
    Originals,
    draw_counts,
    mean_interval,
    paired_difference,
    resampled_means,
)
from luve_lightning.functional.patches import FrechetTarget, frechet_distance

VALUES = np.random.default_rng(5).gamma(2.0, 3.0, 40)


def test_agrees_with_scipy() -> None:
    reference = stats.bootstrap(
        (VALUES,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    mean, low, high = mean_interval(VALUES, seed=0, replicates=20_000)
    assert mean == pytest.approx(VALUES.mean(), rel=1e-12)
    width = reference.high - reference.low
    assert low == pytest.approx(reference.low, abs=0.03 * width)
    assert high == pytest.approx(reference.high, abs=0.03 * width)


def test_is_the_loop_that_it_says_it_is() -> None:
    weights = np.arange(1, 41, dtype=float)
    rng = np.random.default_rng(7)
    means = []
    for _ in range(300):
        drawn = rng.integers(40, size=40)
        means.append(np.average(VALUES[drawn], weights=weights[drawn]))
    mean, low, high = mean_interval(VALUES, seed=7, replicates=300, weights=weights)
    assert mean == pytest.approx(np.average(VALUES, weights=weights), rel=1e-12)
    assert (low, high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), rel=1e-12)


def test_two_videos_by_hand() -> None:
    """Means of draws are 0, 1/2 and 1 with 1/4, 1/2 and 1/4: both tails are longer than 2.5 %."""
    mean, low, high = mean_interval([0.0, 1.0], seed=0, replicates=2000)
    assert (mean, low, high) == (0.5, 0.0, 1.0)
    _, draws = resampled_means([0.0, 1.0], 0, 4000)
    assert (draws == 0.5).mean() == pytest.approx(0.5, abs=0.04)


def test_one_video_has_no_interval() -> None:
    mean, low, high = mean_interval([3.5], seed=0)
    assert mean == 3.5
    assert math.isnan(low)
    assert math.isnan(high)


def test_infinite_values_stay_infinite() -> None:
    assert mean_interval([math.inf] * 3, seed=0) == (math.inf, math.inf, math.inf)
    mean, low, high = mean_interval([math.inf, 1.0, 1.0], seed=0)
    assert (mean, low, high) == (math.inf, 1.0, math.inf)
    assert paired_difference([math.inf, 2.0], [math.inf, 1.0], seed=0)[0] == 0.5


def test_a_pair_is_resampled_together() -> None:
    """What makes videos hard for both is no part of the difference: the interval is far narrower than either's."""
    other = VALUES + 0.1 + np.random.default_rng(2).normal(0, 0.05, 40)
    difference, low, high = paired_difference(other, VALUES, seed=0)
    assert difference == pytest.approx((other - VALUES).mean())
    assert low > 0
    assert high - low < 0.1 * (mean_interval(VALUES, 0)[2] - mean_interval(VALUES, 0)[1])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30), st.integers(0, 2**32 - 1))
def test_the_interval_lies_among_the_values_and_repeats(values: list[float], seed: int) -> None:
    result = mean_interval(values, seed, 50)
    assert result == mean_interval(values, seed, 50)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= result[1] <= result[2] <= max(values) + slack


def test_counts_are_the_draws_of_the_means() -> None:
    counts = draw_counts(40, 3, 25)
    assert counts.shape == (25, 40)
    assert (counts.sum(axis=1) == 40).all()
    assert (counts @ VALUES / 40) == pytest.approx(resampled_means(VALUES, 3, 25)[1], rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([], 0), "values: expected one number per video"),
        (lambda: mean_interval([1.0], 0, 0), "replicates: expected at least 1, got 0"),
        (lambda: mean_interval([1.0, 2.0], 0, weights=[1.0, 0.0]), "expected 2 weights > 0"),
        (lambda: mean_interval([1.0, 2.0], 0, weights=[1.0]), "expected 2 weights > 0"),
        (lambda: paired_difference([1.0], [1.0, 2.0], 0), "equally many values, got 1 and 2"),
    ],
)
def test_bad_input_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


VIDEOS, SEED, REPLICATES = 6, 4, 40


def videos(seed: int, shift: float = 0.0, count: int = VIDEOS) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(5 + n, 3, generator=random) + shift + torch.randn(3, generator=random) for n in range(count)]


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
    assert result.value == pytest.approx(frechet_distance(*gaussian(torch.cat(own)), *gaussian(reference)), rel=1e-9)
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
    one, other = (FrechetBootstrap(videos(0), fixed(torch.cat(videos(1))), SEED, REPLICATES) for _ in range(2))
    assert (one.difference(other).value, one.difference(other).low, one.difference(other).high) == (0, 0, 0)


def test_a_difference_is_that_of_the_same_resamples() -> None:
    reference = fixed(torch.cat(videos(1)))
    near, far = (FrechetBootstrap(videos(0, shift), reference, SEED, REPLICATES) for shift in (0.1, 2.0))
    difference = far.difference(near)
    draws = far.draws - near.draws
    shift = difference.value - draws.mean()
    assert difference.value == pytest.approx(far.value - near.value)
    assert (difference.low, difference.high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5]) + shift))
    assert difference.low > 0
    with pytest.raises(ValueError, match="a pair needs the same videos, got 6 and 5"):
        near.difference(FrechetBootstrap(videos(0)[:5], reference, SEED, REPLICATES))


def test_one_video_has_no_interval_and_progress_is_told() -> None:
    told: list[None] = []
    reference = fixed(torch.cat(videos(1)))
    interval = FrechetBootstrap(videos(0)[:1], reference, SEED, REPLICATES, lambda: told.append(None)).interval()
    assert math.isnan(interval.low)
    assert interval.value > 0
    assert not told
    FrechetBootstrap(videos(0), reference, SEED, 3, lambda: told.append(None))
    assert len(told) == 3


def test_too_few_patches_are_no_distance() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        FrechetBootstrap([torch.zeros(1, 3)], fixed(torch.cat(videos(1))), SEED, REPLICATES)
