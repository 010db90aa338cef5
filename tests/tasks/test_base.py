"""What every task checks."""

from __future__ import annotations

import pytest

from luve_lightning.tasks.base import TrainingTask


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.0, 0.0, 0.0, 0), "0 < lr <= 1e"),
        ((1e300, 0.0, 0.0, 0), "0 < lr <= 1e"),  # AdamW's steps would not be float32 numbers
        ((float("nan"), 0.0, 0.0, 0), "0 < lr <= 1e"),
        ((float("inf"), 0.0, 0.0, 0), "0 < lr <= 1e"),
        ((1e-3, -1e-6, 0.0, 0), "0 <= min_lr <= lr"),
        ((1e-3, 1e-2, 0.0, 0), "0 <= min_lr <= lr"),
        ((1e-3, 0.0, -1.0, 0), "0 <= weight_decay <= 1e"),
        ((1e-3, 0.0, float("inf"), 0), "0 <= weight_decay <= 1e"),
        ((1e-3, 0.0, 0.0, -1), "warmup_steps >= 0"),
    ],
)
def test_rates_that_cannot_train_are_refused(values: tuple[float, float, float, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingTask(*values)


def test_the_rate_falls_over_the_last_steps_and_ends_at_the_least() -> None:
    task = TrainingTask(1e-3, 1e-5, 0.0, 4, decay_steps=10)
    rates = [task.learning_rate(step, 40) for step in range(41)]
    assert rates[:4] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4])
    assert rates[4:31] == [1e-3] * 27, "up to the first step of the decay"
    assert rates[35] == pytest.approx((1e-3 + 1e-5) / 2), "a cosine's middle"
    assert rates[40] == pytest.approx(1e-5)
    longer = [task.learning_rate(step, 60) for step in range(31)]
    assert longer == rates[:31], "a longer run is the same until the shorter one's decay"


def test_without_decay_steps_the_cosine_begins_after_the_warm_up() -> None:
    short, whole = TrainingTask(1e-3, 0.0, 0.0, 4, decay_steps=36), TrainingTask(1e-3, 0.0, 0.0, 4)
    longer = TrainingTask(1e-3, 0.0, 0.0, 4, decay_steps=1000)  # than the run: it begins after the warm-up, too
    for step in range(41):
        assert short.learning_rate(step, 40) == whole.learning_rate(step, 40) == longer.learning_rate(step, 40)


def test_a_decay_of_no_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="decay_steps: expected at least 1, or null"):
        TrainingTask(1e-3, 0.0, 0.0, 0, decay_steps=0)


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, -0.1), (0.9, float("nan"))])
def test_moments_that_never_decay_are_refused(betas: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"betas: expected two numbers in \[0, 1\), got"):
        TrainingTask(1e-3, 0.0, 0.0, 0, betas)
