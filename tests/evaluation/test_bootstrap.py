"""Intervals of means against scipy, a loop and cases counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from luve_lightning.evaluation.bootstrap import draw_counts, mean_interval, paired_difference, resampled_means

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
        (lambda: mean_interval([], 0), "values: expected one number a video"),
        (lambda: mean_interval([1.0], 0, 0), "replicates: expected at least 1, got 0"),
        (lambda: mean_interval([1.0, 2.0], 0, weights=[1.0, 0.0]), "expected 2 weights > 0"),
        (lambda: mean_interval([1.0, 2.0], 0, weights=[1.0]), "expected 2 weights > 0"),
        (lambda: paired_difference([1.0], [1.0, 2.0], 0), "equally many values, got 1 and 2"),
    ],
)
def test_bad_input_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
