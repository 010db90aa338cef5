"""Percentile bootstrap over videos: how certain a mean is, with videos drawn with replacement.

Two methods measured on the same videos are resampled together, so the interval of their difference is free of what
makes some videos harder for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from luve_lightning.functional.patches import FrechetTarget
from luve_lightning.terminal import amount

if TYPE_CHECKING:  # torchmetrics takes two seconds to import, and intervals of plain numbers need none of it
    from luve_lightning.metrics.feature_moments import FeatureMoments

LEVEL = 0.95
_VALUES_AT_ONCE = 2**24


@dataclass(frozen=True)
class Interval:
    """A value over videos with its 95 % interval.

    Attributes:
        value: value of the sample itself.
        low: lower end; NaN for one video or none, which say nothing about the spread.
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
        values: one per video, at least one.
        seed: seed of the resampling; every measure of the same number of videos draws the same ones.
        replicates: number of resamples.
        weights: weight of each video, > 0; equal when None.

    Returns:
        (mean, low, high); low and high are NaN for a single video.

    Raises:
        ValueError: no values, or a wrong number of weights.
    """
    mean, draws = resampled_means(values, seed, replicates, weights)
    return (mean, *percentiles(draws, np.size(values)))


def resampled_means(
    values: ArrayLike, seed: int, replicates: int, weights: ArrayLike | None = None
) -> tuple[float, NDArray[np.float64]]:
    """The mean, and that of every resample; see `mean_interval`.

    Raises:
        ValueError: no values, or a wrong number of weights.
    """
    sample = _vector(values, "values")
    weight = np.ones_like(sample) if weights is None else _vector(weights, "weights")
    if sample.shape != weight.shape or not (weight > 0).all():
        raise ValueError(f"expected {amount(len(sample), 'weight')} > 0, got {weight}")
    mean = _weighted(sample, weight, np.arange(len(sample))[None])[0]
    draws = [_weighted(sample, weight, drawn) for drawn in _drawn(len(sample), seed, replicates)]
    return float(mean), np.concatenate(draws)


def paired_difference(
    values: ArrayLike, others: ArrayLike, seed: int, replicates: int = 1000, weights: ArrayLike | None = None
) -> tuple[float, float, float]:
    """The mean of `values - others`, measured on the same videos in the same order, and its 95 % interval.

    Args:
        values: one per video.
        others: the other method's, in the same order.
        seed: see `mean_interval`.
        replicates: see `mean_interval`.
        weights: see `mean_interval`.

    Raises:
        ValueError: no values, or different numbers of them.
    """
    first, second = _vector(values, "values"), _vector(others, "others")
    if first.shape != second.shape:
        raise ValueError(f"a pair needs equally many values, got {len(first)} and {len(second)}")
    # Two infinite PSNRs (both equal to the original) do not differ.
    with np.errstate(invalid="ignore"):
        difference = np.where(first == second, 0.0, first - second)
    return mean_interval(difference, seed, replicates, weights)


def draw_counts(videos: int, seed: int, replicates: int) -> NDArray[np.int64]:
    """How often each replicate draws each video: replicates x videos, exactly the draws of `mean_interval`."""
    counts = [
        np.stack([np.bincount(row, minlength=videos) for row in drawn]) for drawn in _drawn(videos, seed, replicates)
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
        raise ValueError(f"{name}: expected one number per video, got shape {array.shape}")
    return array


Counts = NDArray[np.int64]
Distance = Callable[["FeatureMoments", Counts | None], float]
"""From the moments of a resample, and how often it has each video (None: the sample itself), to the reference."""


class Originals:
    """A reference that is resampled, too: a resample has a video's original as often as the video.

    Methods are to make exactly the reference's videos, so the choice of videos moves both. Originals of other
    names stay.

    Args:
        features: features of each original by name, N x D.
        names: names of the resampled videos, in the order of the counts.
    """

    def __init__(self, features: Mapping[str, Tensor], names: Sequence[str]) -> None:
        from luve_lightning.metrics.feature_moments import GroupedMoments

        self.names = sorted(features)
        self.moments = GroupedMoments([features[name] for name in self.names])
        places = {name: place for place, name in enumerate(names)}
        self.places = [places.get(name) for name in self.names]
        self.whole = self._target(None)

    def _target(self, counts: Counts | None) -> FrechetTarget:
        drawn = [1 if counts is None or place is None else int(counts[place]) for place in self.places]
        moments = self.moments.weighted(drawn)
        return FrechetTarget.of(moments.mean(), moments.cov())

    def distance(self, moments: FeatureMoments, counts: Counts | None) -> float:
        """See `Distance`."""
        target = self.whole if counts is None else self._target(counts)
        return target.distance(moments.mean(), moments.cov())


class KernelTarget:
    """Features of a reference's videos, compared with the kernel of KID: k(x, y) = (x y / D + 1)^3.

    Args:
        features: features of each video, N x D.

    Raises:
        ValueError: fewer than two videos.
    """

    def __init__(self, features: Sequence[Tensor]) -> None:
        if len(features) < 2:
            raise ValueError(f"{len(features)} videos of the reference: at least 2 are needed")
        self.features = features
        self.own = between_videos(features, features)
        weights = _pairs(np.ones(len(features)))
        self.mean = float((self.own * weights).sum() / (weights * _sizes(features, features)).sum())


class KernelBootstrap:
    """The kernel distance of one method's videos from a reference, and of their resamples.

    KID (Binkowski et al. 2018, arXiv 1801.01401), the squared maximum mean discrepancy by the unbiased estimator: its
    mean does not depend on the number of videos, unlike the Fréchet distance's, so it may be negative. Patches of one
    video are alike, so pairs from one video are left out of the terms within a set. Resamples leave out pairs of a
    video with itself, too, and draw the method's videos only.

    Args:
        features: features of each video, N x D.
        target: the reference.
        seed: seed of the resampling.
        replicates: number of resamples.

    Raises:
        ValueError: fewer than two videos.
    """

    def __init__(self, features: Sequence[Tensor], target: KernelTarget, seed: int, replicates: int) -> None:
        self.videos = len(features)
        if self.videos < 2:
            raise ValueError(f"{amount(self.videos, 'video')}: a kernel distance needs at least 2")
        own, size = between_videos(features, features), _sizes(features, features)
        across = between_videos(features, target.features).sum(1)
        across_size = _sizes(features, target.features).sum(1)

        def distance(counts: NDArray[np.float64]) -> float:
            pairs = _pairs(counts)
            within = (own * pairs).sum() / (size * pairs).sum() if pairs.any() else np.nan
            return float(within + target.mean - 2 * (across @ counts) / (across_size @ counts))

        self.value = distance(np.ones(self.videos))
        draws = draw_counts(self.videos, seed, replicates).astype(np.float64)
        self.draws: NDArray[np.float64] = np.array([distance(counts) for counts in draws if (counts > 0).sum() > 1])

    def interval(self) -> Interval:
        """The distance with its 95 % interval."""
        return Interval(self.value, *percentiles(self.draws, self.videos), self.videos)

    def difference(self, other: KernelBootstrap) -> Interval:
        """This distance minus the other's, for videos of the same names in the same order, drawn alike.

        Raises:
            ValueError: different numbers of videos or replicates.
        """
        if (self.videos, len(self.draws)) != (other.videos, len(other.draws)):
            raise ValueError(f"a pair needs the same videos, got {self.videos} and {other.videos}")
        ends = percentiles(self.draws - other.draws, self.videos)
        return Interval(self.value - other.value, *ends, self.videos)


def between_videos(first: Sequence[Tensor], second: Sequence[Tensor]) -> NDArray[np.float64]:
    """Sums of KID's kernel over the pairs of features of two videos, for each video of the one set and the other."""
    others = torch.cat([rows.double() for rows in second])
    ends = np.cumsum([len(rows) for rows in second])[:-1]
    sums = [((rows.double() @ others.T / others.shape[1] + 1) ** 3).sum(0).numpy() for rows in first]
    return np.array([[part.sum() for part in np.split(total, ends)] for total in sums])


def _sizes(first: Sequence[Tensor], second: Sequence[Tensor]) -> NDArray[np.float64]:
    return np.outer([len(rows) for rows in first], [len(rows) for rows in second]).astype(np.float64)


def _pairs(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """How often a resample has each pair of different videos."""
    pairs = np.outer(counts, counts)
    np.fill_diagonal(pairs, 0)
    return pairs


class FrechetBootstrap:
    """The distance of one method's videos from a reference, and of their resamples.

    A resample holds fewer different videos than the sample, and the distance of fewer videos is larger (its bias
    falls like 1/N, Chong and Forsyth 2020), so resampled distances lie above the sample's. Their percentiles are
    therefore shifted by the difference between the sample's distance and the resamples' mean. The bias of the
    sample itself remains; it is the same for methods of equally many patches.

    Args:
        features: features of each video, N x D float32.
        distance: distance to the reference.
        seed: seed of the resampling.
        replicates: number of resamples.
        advance: called for every computed distance.
    """

    def __init__(
        self,
        features: Sequence[Tensor],
        distance: Distance,
        seed: int,
        replicates: int,
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        from luve_lightning.metrics.feature_moments import GroupedMoments

        moments = GroupedMoments(features)
        self.videos = len(features)
        self.value = distance(moments.weighted([1] * self.videos), None)
        draws = []
        for counts in draw_counts(self.videos, seed, replicates) if self.videos > 1 else ():
            draws.append(distance(moments.weighted(torch.from_numpy(counts)), counts))
            advance()
        self.draws: NDArray[np.float64] = np.array(draws)

    def interval(self) -> Interval:
        """The distance with its shifted 95 % interval, never below 0."""
        low, high = _shifted(self.value, self.draws, self.videos)
        return Interval(self.value, max(low, 0.0) if low == low else low, high, self.videos)

    def difference(self, other: FrechetBootstrap) -> Interval:
        """This distance minus the other's, with its shifted 95 % interval.

        Args:
            other: for videos of the same names, in the same order, with the same seed and replicates.

        Raises:
            ValueError: different numbers of videos or replicates.
        """
        if (self.videos, len(self.draws)) != (other.videos, len(other.draws)):
            raise ValueError(f"a pair needs the same videos, got {self.videos} and {other.videos}")
        value = self.value - other.value
        return Interval(value, *_shifted(value, self.draws - other.draws, self.videos), self.videos)


def _shifted(value: float, draws: NDArray[np.float64], videos: int) -> tuple[float, float]:
    if videos < 2:
        return float("nan"), float("nan")
    low, high = percentiles(draws, videos)
    shift = value - float(draws.mean())
    return low + shift, high + shift
