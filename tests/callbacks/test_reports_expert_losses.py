"""The interval that goes with an expert's gain; what is written is in tests/tasks/test_expert.py."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning.callbacks.reports import bootstrap_interval


@pytest.mark.parametrize("count", [20, 60])
def test_it_is_the_normal_interval_of_many_values(count: int) -> None:
    values = np.random.default_rng(count).normal(-0.1, 0.05, count)
    low, high = bootstrap_interval(values.tolist())
    error = 1.96 * values.std() / count**0.5
    assert low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.1 * error)


def test_a_smaller_share_lies_within() -> None:
    values = [0.1, -0.4, 0.3, -0.2, 0.6]
    wide, narrow = bootstrap_interval(values), bootstrap_interval(values, 0.5)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@settings(max_examples=8, deadline=None)
@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=6), shift=st.integers(-3, 3))
def test_it_holds_the_mean_and_moves_with_the_values(values: list[float], shift: int) -> None:
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values), "the same for the same values"
    assert min(values) - 1e-9 <= low <= np.mean(values) + 1e-9
    assert np.mean(values) - 1e-9 <= high <= max(values) + 1e-9
    moved = bootstrap_interval([value + shift for value in values])
    assert moved == pytest.approx((low + shift, high + shift), abs=1e-9)
