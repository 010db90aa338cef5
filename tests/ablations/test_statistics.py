"""Intervals over seeds and directions, against plain computations."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from luve_lightning.ablations.results import direction, paired, t_interval

NUMBERS = st.floats(-1e4, 1e4).map(lambda value: round(value, 6))
SAMPLES = st.lists(NUMBERS, min_size=2, max_size=6)


def test_three_seeds_by_hand() -> None:
    """t(0.975, 2) is 4.302653 in every table."""
    found = t_interval([1.0, 2.0, 6.0])
    half = 4.302653 * math.sqrt(7.0) / math.sqrt(3)
    assert (found.mean, found.seeds) == (3.0, 3)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), rel=1e-6)


@given(SAMPLES)
def test_it_is_scipys_interval(values: list[float]) -> None:
    found = t_interval(values)
    assert found.mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    if error > 1e-6:
        low, high = scipy.stats.t.interval(0.95, len(values) - 1, found.mean, error)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6, abs=1e-6)


@given(SAMPLES, st.floats(-100, 100), st.sampled_from([-3.0, 0.5, 2.0]))
def test_it_moves_and_stretches_with_the_values(values: list[float], shift: float, scale: float) -> None:
    before = t_interval(values)
    after = t_interval([scale * value + shift for value in values])
    ends = sorted((scale * before.low + shift, scale * before.high + shift))
    assert [after.low, after.high] == pytest.approx(ends, rel=1e-6, abs=1e-6)


@given(SAMPLES)
def test_the_order_of_seeds_does_not_matter(values: list[float]) -> None:
    assert t_interval(values) == t_interval(values[::-1])


def test_one_seed_has_no_interval() -> None:
    found = t_interval([4.0])
    assert found.mean == 4.0
    assert math.isnan(found.low)
    assert math.isnan(found.high)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf, 1.0]])
def test_what_is_no_number_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        t_interval(values)


def test_a_pair_is_of_the_seeds_that_both_have() -> None:
    found = paired({0: 1.0, 1: 5.0, 2: 9.0}, {1: 4.0, 2: 7.0, 3: 0.0})
    assert found == t_interval([1.0, 2.0])
    assert paired({0: 1.0}, {1: 1.0}) is None


@given(SAMPLES, NUMBERS)
def test_what_a_seed_adds_to_both_cancels(values: list[float], shift: float) -> None:
    """What makes a seed easy for both rows does not widen the interval of their difference."""
    first = dict(enumerate(values))
    found = paired({seed: value + shift for seed, value in first.items()}, first)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((shift, shift), abs=1e-6)


@pytest.mark.parametrize(
    ("values", "paper", "better", "paper_better", "expected"),
    [
        ([1.0, 1.1, 0.9], 2.0, "lower", "lower", "same"),
        ([-1.0, -1.1, -0.9], 2.0, "lower", "lower", "opposite"),
        ([-1.0, -1.1, -0.9], 2.0, "higher", "lower", "same"),
        ([1.0, -1.0, 0.5], 2.0, "lower", "lower", "none"),
        ([1.0], 2.0, "lower", "lower", "none"),
        ([0.0, 0.0], 2.0, "lower", "lower", "none"),
        ([1.0, 1.1, 0.9], None, "lower", "lower", ""),
        ([0.0, 0.0], 0.0, "lower", "lower", ""),
    ],
)
def test_direction(values, paper, better, paper_better, expected) -> None:  # type: ignore[no-untyped-def]
    assert direction(t_interval(values), paper, better, paper_better) == expected


@given(st.lists(NUMBERS, min_size=2, max_size=5), st.sampled_from([-2.0, 2.0]))
def test_direction_does_not_depend_on_the_sign_convention(values: list[float], paper: float) -> None:
    """Counting points lost instead of points won turns both signs and both senses of better."""
    turned = t_interval([-value for value in values])
    there = direction(t_interval(values), paper, "higher", "higher")
    assert direction(turned, -paper, "lower", "lower") == there
    assert direction(turned, paper, "lower", "higher") == there


def test_nothing_to_compare_with() -> None:
    assert direction(None, 1.0, "lower", "lower") == ""
