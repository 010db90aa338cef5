"""Means over seeds, how sure they are, and whether a difference has the paper's direction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from luve_lightning.ablations.table import Better

LEVEL = 0.95

Direction = Literal["same", "opposite", "none", ""]


@dataclass(frozen=True)
class SeedInterval:
    """A mean over seeds with its 95 % interval.

    Attributes:
        mean: over the seeds.
        low: lower end; NaN for fewer than two seeds, which say nothing of the spread.
        high: upper end.
        seeds: how many.
    """

    mean: float
    low: float
    high: float
    seeds: int


def t_interval(values: Sequence[float]) -> SeedInterval:
    """The mean and mean ± t s / sqrt(n), t the 97.5th percentile of Student's distribution with n - 1 degrees.

    Args:
        values: one a seed, at least one, finite.

    Raises:
        ValueError: none, or one that is no number.
    """
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"expected at least one finite number, got {list(values)}")
    from scipy.stats import t

    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return SeedInterval(mean, math.nan, math.nan, count)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * spread / math.sqrt(count)
    return SeedInterval(mean, mean - half, mean + half, count)


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> SeedInterval | None:
    """The interval of `values - others` over the seeds that both have; None when they share none."""
    common = sorted(values.keys() & others.keys())
    return t_interval([values[seed] - others[seed] for seed in common]) if common else None


def direction(
    difference: SeedInterval | None,
    paper_difference: float | None,
    better: Better,
    paper_better: Better,
) -> Direction:
    """Whether a difference from the reference row goes the paper's way.

    Args:
        difference: of the row.
        paper_difference: of the paper's values.
        better: which direction of ours is better.
        paper_better: which of the paper's.

    Returns:
        "same" or "opposite" in the sense of better and worse; "none" when the interval holds 0 or there is none, as of
        one seed; "" when there is nothing to compare with.
    """
    if difference is None or paper_difference is None or paper_difference == 0:
        return ""
    if not (difference.low > 0 or difference.high < 0):
        return "none"
    ours = (difference.mean > 0) == (better == "higher")
    papers = (paper_difference > 0) == (paper_better == "higher")
    return "same" if ours == papers else "opposite"
