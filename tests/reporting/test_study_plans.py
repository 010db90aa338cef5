"""Who sees what where."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning.reporting.study import plan_rater


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 25), st.integers(2, 6), st.floats(0, 1), st.integers(0, 2**32))
def test_a_plan_is_balanced_and_complete(items: int, methods: int, share: float, seed: int) -> None:
    repeats = round(share * items)
    plan = plan_rater(items, methods, repeats, np.random.default_rng(seed))
    first = [trial for trial in plan if trial.first is None]
    again = [trial for trial in plan if trial.first is not None]
    assert sorted(trial.item for trial in first) == list(range(items))
    assert len(again) == repeats == len({trial.item for trial in again})
    assert all(sorted(trial.order) == list(range(methods)) for trial in plan)
    for position in range(methods):
        counts = Counter(trial.order[position] for trial in first)
        assert {counts[m] for m in range(methods)} <= {items // methods, -(-items // methods)}
    for number, trial in enumerate(plan):
        if trial.first is not None:
            before = plan[trial.first]
            assert trial.first < number
            assert before.item == trial.item
            assert all(a != b for a, b in zip(before.order, trial.order, strict=True))


def test_a_repetition_is_not_next_to_its_first_showing() -> None:
    for seed in range(20):
        plan = plan_rater(60, 4, 6, np.random.default_rng(seed))
        gaps = [number - trial.first for number, trial in enumerate(plan) if trial.first is not None]
        assert len(gaps) == 6
        assert min(gaps) > 4


def test_raters_see_different_things_and_a_seed_the_same() -> None:
    plans = [plan_rater(12, 4, 2, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]


@pytest.mark.parametrize("position", range(4))
def test_no_position_is_a_methods_own(position: int) -> None:
    """Over raters, the partial block at the end favours no method."""
    rng = np.random.default_rng(0)
    counts = Counter(
        trial.order[position] for _ in range(400) for trial in plan_rater(6, 4, 0, rng)[:6] if trial.first is None
    )
    shares = np.array([counts[m] for m in range(4)]) / sum(counts.values())
    assert np.abs(shares - 0.25).max() < 0.02
