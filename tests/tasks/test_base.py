"""What every task checks of its optimiser's numbers."""

from __future__ import annotations

import math

import pytest

from luve_lightning.tasks.base import TrainingTask


@pytest.mark.parametrize(
    ("lr", "min_lr"), [(0.0, 0.0), (-1.0, 0.0), (math.inf, 0.0), (math.nan, 0.0), (1e-3, 1e-2), (1e-3, -1e-6)]
)
def test_learning_rates_that_train_nothing(lr: float, min_lr: float) -> None:
    with pytest.raises(ValueError, match=r"^expected 0 <= min_lr <= lr and a finite lr > 0, got lr="):
        TrainingTask(lr, min_lr, 0.0, 0)
