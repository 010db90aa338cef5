"""How sure a mean over videos is: percentile bootstrap, videos drawn with replacement.

Two methods measured on the same videos are resampled together, so the interval of their difference is free of what
makes some videos harder for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
_VALUES_AT_ONCE = 2**24


@dataclass(frozen=True)
class Interval:
    """A value over videos with its 95 % interval.

    Attributes:
        value: of the sample itself.
        low: lower end; NaN where one video, or none, says nothing of the spread.
        high: upper end.
        n: videos.
    """

    value: float
    low: float
    high: float
    n: int


def mean_interval(
    values: ArrayLike, seed: int, replicates: int = 1000, weights: ArrayLike | None = None
) -> tuple[float, float, float]:
    """The mean over videos and its 95 % interval: the 2.5th and 97.5th percentiles of resampled means.

    Args:
        values: one a video, at least one.
        seed: of the resampling; the same videos are drawn for every measure of equally many.
        replicates: how often the videos are drawn anew.
        weights: how much each video counts, > 0; equally when None.

    Returns:
        (mean, low, high); low and high are NaN for a single video.

    Raises:
        ValueError: no values, or other numbers of weights.
    """
    mean, draws = resampled_means(values, seed, replicates, weights)
    return (mean, *percentiles(draws, np.size(values)))


def resampled_means(
    values: ArrayLike, seed: int, replicates: int, weights: ArrayLike | None = None
) -> tuple[float, NDArray[np.float64]]:
    """The mean, and those of every resample; see `mean_interval`.

    Raises:
        ValueError: no values, or other numbers of weights.
    """
    sample = _vector(values, "values")
    weight = np.ones_like(sample) if weights is None else _vector(weights, "weights")
    if sample.shape != weight.shape or not (weight > 0).all():
        raise ValueError(f"expected {len(sample)} weights > 0, got {weight}")
    mean = _weighted(sample, weight, np.arange(len(sample))[None])[0]
    draws = [_weighted(sample, weight, drawn) for drawn in _drawn(len(sample), seed, replicates)]
    return float(mean), np.concatenate(draws)


def paired_difference(
    values: ArrayLike,
    others: ArrayLike,
    seed: int,
    replicates: int = 1000,
    weights: ArrayLike | None = None,
) -> tuple[float, float, float]:
    """The mean of `values - others`, measured on the same videos in the same order, and its 95 % interval.

    Args:
        values: one a video.
        others: of the other method, in the same order.
        seed: see `mean_interval`.
        replicates: see `mean_interval`.
        weights: see `mean_interval`.

    Raises:
        ValueError: no values, or different numbers of them.
    """
    first, second = _vector(values, "values"), _vector(others, "others")
    if first.shape != second.shape:
        raise ValueError(f"a pair needs equally many values, got {len(first)} and {len(second)}")
    # Two infinite PSNRs (both equal to the original) differ by nothing.
    with np.errstate(invalid="ignore"):
        difference = np.where(first == second, 0.0, first - second)
    return mean_interval(difference, seed, replicates, weights)


def draw_counts(videos: int, seed: int, replicates: int) -> NDArray[np.int64]:
    """How often each replicate has each video: replicates x videos, the very draws of `mean_interval`."""
    counts = [
        np.stack([np.bincount(row, minlength=videos) for row in drawn])
        for drawn in _drawn(videos, seed, replicates)
    ]
    return np.concatenate(counts)


def percentiles(draws: NDArray[np.float64], videos: int) -> tuple[float, float]:
    """The ends of the 95 % interval; NaN for fewer than two videos, whose resampled means are all equal."""
    if videos < 2:
        return float("nan"), float("nan")
    # Between two infinite values there is nothing to interpolate.
    method = "linear" if np.isfinite(draws).all() else "nearest"
    low, high = np.quantile(draws, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), method=method)  # type: ignore[call-overload]
    return float(low), float(high)


def _drawn(videos: int, seed: int, replicates: int) -> Iterator[NDArray[np.int64]]:
    """Indices of the videos of each replicate, some replicates at a time to bound memory."""
    if replicates < 1:
        raise ValueError(f"replicates: expected at least 1, got {replicates}")
    rng = np.random.default_rng(seed)
    at_once = max(1, _VALUES_AT_ONCE // videos)
    for start in range(0, replicates, at_once):
        yield rng.integers(videos, size=(min(at_once, replicates - start), videos))


def _weighted(
    values: NDArray[np.float64], weights: NDArray[np.float64], drawn: NDArray[np.int64]
) -> NDArray[np.float64]:
    return (values * weights)[drawn].sum(axis=1) / weights[drawn].sum(axis=1)


def _vector(values: ArrayLike | Sequence[float], name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name}: expected one number a video, got shape {array.shape}")
    return array
