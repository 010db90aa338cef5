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


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, -0.1), (0.9, float("nan"))])
def test_moments_that_never_decay_are_refused(betas: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"betas: expected two numbers in \[0, 1\), got"):
        TrainingTask(1e-3, 0.0, 0.0, 0, betas)
