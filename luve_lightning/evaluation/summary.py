"""From results of videos to a table: means, Fréchet distances and differences, each with its interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from luve_lightning.evaluation.bootstrap import (
    Distance,
    FrechetBootstrap,
    Interval,
    KernelBootstrap,
    KernelTarget,
    Originals,
    mean_interval,
    paired_difference,
    percentiles,
    resampled_means,
)
from luve_lightning.evaluation.prepared_metrics import ReadyMetric, Skipped
from luve_lightning.evaluation.result_cache import ResultCache, Score
from luve_lightning.evaluation.runner import Measurements, Problem
from luve_lightning.metrics.feature_moments import FeatureStatistics
from luve_lightning.metrics.vbench import VBENCH_DIMENSIONS, vbench_average


@dataclass(frozen=True)
class Difference:
    """One method minus another on the videos that both have.

    Attributes:
        metric: the column.
        first: a method.
        second: method that is subtracted.
        interval: interval of the difference; the methods differ when 0 is outside it.
    """

    metric: str
    first: str
    second: str
    interval: Interval


@dataclass(frozen=True)
class Resampling:
    """How intervals are made.

    Attributes:
        seed: seed of the draws.
        replicates: number of draws for means.
        frechet_replicates: number of draws for Fréchet distances; each decomposes a matrix.
    """

    seed: int = 0
    replicates: int = 1000
    frechet_replicates: int = 200

    def __post_init__(self) -> None:
        if self.seed < 0 or min(self.replicates, self.frechet_replicates) < 1:
            raise ValueError(
                f"expected seed >= 0, replicates >= 1 and frechet_replicates >= 1, got {self.seed}, "
                f"{self.replicates} and {self.frechet_replicates}"
            )


@dataclass
class Summary:
    """The table.

    Attributes:
        intervals: by metric, then method; methods without a result are absent.
        differences: differences of the requested pairs.
        problems: results that could not be combined.
        metrics: the columns, in order; those of the results and those computed from them.
    """

    metrics: list[ReadyMetric]

    intervals: dict[str, dict[str, Interval]] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


_ALL = "all of them"


class DistanceColumn:
    """One Fréchet distance for all methods.

    Args:
        summary: receives the results.
        metric: the distance.
        found: says where the features of each video are.
        cache: the features.
        resampling: how intervals are made.
        advance: called for every distance of a resample.
    """

    def __init__(
        self,
        summary: Summary,
        metric: ReadyMetric,
        found: Measurements,
        cache: ResultCache,
        resampling: Resampling,
        advance: Callable[[], None],
    ) -> None:
        assert metric.frechet is not None
        self.summary, self.metric, self.frechet, self.cache = summary, metric, metric.frechet, cache
        self.resampling, self.advance = resampling, advance
        self.keys = found.features.get(metric.name, {})
        self.originals: dict[str, Tensor] = {}
        self.bootstraps: dict[tuple[str, tuple[str, ...]], FrechetBootstrap] = {}

    def add(self, methods: Sequence[str], pairs: Sequence[tuple[str, str]]) -> None:
        """Add the column to the summary."""
        name = self.metric.name
        if self.metric.needs_originals_features:
            self.originals = {video: self._features(None, video) for video in self.keys.get(None, {})}
            if not self.originals:
                self.summary.problems.append(Problem(None, _ALL, "no original could be measured", name))
                return
        for method in methods:
            own = sorted(self.keys.get(method, {}))
            try:
                if own:
                    interval = self._bootstrap(method, own).interval()
                    self.summary.intervals.setdefault(name, {})[method] = interval
            except ValueError as error:  # too few patches
                self.summary.problems.append(Problem(method, _ALL, str(error), name))
        done = self.summary.intervals.get(name, {})
        for first, second in pairs:
            common = sorted(self.keys.get(first, {}).keys() & self.keys.get(second, {}).keys())
            if common and first in done and second in done:
                interval = self._bootstrap(first, common).difference(self._bootstrap(second, common))
                self.summary.differences.append(Difference(name, first, second, interval))

    def _features(self, method: str | None, video: str) -> Tensor:
        features = self.cache.features(self.keys[method][video])
        if features is None:
            raise FileNotFoundError(f"{self.cache.folder}: features of {video} have gone meanwhile; run again")
        return features

    def _bootstrap(self, method: str, videos: list[str]) -> FrechetBootstrap:
        """The bootstrap of these videos of a method, made once."""
        key = (method, tuple(videos))
        if key not in self.bootstraps:
            distance: Distance = lambda moments, counts: self.frechet.distance(moments)  # noqa: E731
            if self.originals:
                distance = Originals(self.originals, videos).distance
            features = [self._features(method, video) for video in videos]
            seed, replicates = self.resampling.seed, self.resampling.frechet_replicates
            self.bootstraps[key] = FrechetBootstrap(features, distance, seed, replicates, self.advance)
        return self.bootstraps[key]

    def add_kernel(self, methods: Sequence[str], pairs: Sequence[tuple[str, str]]) -> None:
        """Add the column of the kernel distance of the same features to the summary."""
        name = self.frechet.kernel_name
        known = self.frechet.reference
        if isinstance(known, FeatureStatistics):
            assert known.rows is not None
            reference = list(known.rows.split(list(known.lengths)))
        else:
            reference = [self._features(None, video) for video in sorted(self.keys.get(None, {}))]

        def bootstrap(method: str, videos: list[str]) -> KernelBootstrap:
            features = [self._features(method, video) for video in videos]
            return KernelBootstrap(features, target, self.resampling.seed, self.resampling.replicates)

        try:
            target = KernelTarget(reference)
        except ValueError as error:
            self.summary.problems.append(Problem(None, _ALL, str(error), name))
            return
        self.summary.metrics.append(ReadyMetric(name, None, "", False, self.metric.resolution))
        for method in methods:
            own = sorted(self.keys.get(method, {}))
            try:
                if own:
                    self.summary.intervals.setdefault(name, {})[method] = bootstrap(method, own).interval()
            except ValueError as error:  # a single video
                self.summary.problems.append(Problem(method, _ALL, str(error), name))
        done = self.summary.intervals.get(name, {})
        for first, second in pairs:
            common = sorted(self.keys.get(first, {}).keys() & self.keys.get(second, {}).keys())
            if len(common) > 1 and first in done and second in done:
                interval = bootstrap(first, common).difference(bootstrap(second, common))
                self.summary.differences.append(Difference(name, first, second, interval))


VBENCH_AVERAGE = "vbench_average"
Scores = Mapping[str, Mapping[str, Mapping[str, Score]]]


class AverageDraws:
    """One method's average over some videos, and over resamples of them: the same videos for all dimensions.

    Args:
        scores: the method's scores, by dimension and video.
        videos: which ones.
        seed: seed of the resampling.
        replicates: number of resamples.
    """

    def __init__(
        self, scores: Mapping[str, Mapping[str, Score]], videos: Sequence[str], seed: int, replicates: int
    ) -> None:
        means: dict[str, float] = {}
        draws: list[NDArray[np.float64]] = []
        for name in VBENCH_DIMENSIONS:
            own = [scores[name][video] for video in videos]
            means[name], drawn = resampled_means(
                [score.value for score in own], seed, replicates, [score.weight for score in own]
            )
            draws.append(drawn)
        self.value, self.draws, self.videos = vbench_average(means), np.mean(draws, axis=0), len(videos)

    def interval(self) -> Interval:
        """The average with its 95 % interval."""
        return Interval(self.value, *percentiles(self.draws, self.videos), self.videos)

    def difference(self, other: AverageDraws) -> Interval:
        """This average minus the other's, for the same videos in the same order."""
        ends = percentiles(self.draws - other.draws, self.videos)
        return Interval(self.value - other.value, *ends, self.videos)


def of_method(scores: Scores, method: str) -> dict[str, Mapping[str, Score]]:
    """A method's scores by dimension."""
    return {name: scores.get(name, {}).get(method, {}) for name in VBENCH_DIMENSIONS}


def complete_videos(scores: Scores, methods: Sequence[str]) -> list[str]:
    """The videos for which every method has all five dimensions."""
    sets = [found.keys() for method in methods for found in of_method(scores, method).values()]
    return sorted(set.intersection(*map(set, sets)))


def why_not(measured: Sequence[str], wanted: Sequence[str]) -> Skipped | None:
    """Why there is no average, when some of the dimensions were requested.

    Args:
        measured: columns that ran.
        wanted: columns that ran or should have run.
    """
    missing = [name for name in VBENCH_DIMENSIONS if name not in measured]
    if not missing or not set(wanted) & set(VBENCH_DIMENSIONS):
        return None
    return Skipped(VBENCH_AVERAGE, f"needs all five dimensions, missing: {', '.join(missing)}")


def summarise(
    found: Measurements,
    cache: ResultCache,
    methods: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    resampling: Resampling,
    advance: Callable[[], None] = lambda: None,
) -> Summary:
    """Combine the results of all videos.

    Args:
        found: the results.
        cache: holds the features.
        methods: in the table's order.
        pairs: methods to compare; the second is subtracted from the first.
        resampling: how intervals are made.
        advance: called for every Fréchet distance of a resample, see `distances`.
    """
    summary = Summary(list(found.metrics))
    for metric in found.metrics:
        if metric.frechet is None:
            _add_means(summary, metric, found.scores.get(metric.name, {}), methods, pairs, resampling)
        else:
            column = DistanceColumn(summary, metric, found, cache, resampling, advance)
            column.add(methods, pairs)
            if metric.frechet.kernel:
                column.add_kernel(methods, pairs)
    _add_vbench_average(summary, found, methods, pairs, resampling)
    return summary


def distances(found: Measurements, methods: Sequence[str], resampling: Resampling) -> int:
    """The approximate number of Fréchet distances that `summarise` computes."""
    sets = [metric for metric in found.metrics if metric.frechet is not None]
    return len(sets) * len(methods) * resampling.frechet_replicates


def _add_means(
    summary: Summary,
    metric: ReadyMetric,
    scores: dict[str, dict[str, Score]],
    methods: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    resampling: Resampling,
) -> None:
    seed, replicates = resampling.seed, resampling.replicates
    for method in methods:
        own = [score for _, score in sorted(scores.get(method, {}).items())]
        if own:
            values, weights = [s.value for s in own], [s.weight for s in own]
            interval = Interval(*mean_interval(values, seed, replicates, weights), len(own))
            summary.intervals.setdefault(metric.name, {})[method] = interval
    for first, second in pairs:
        ours, theirs = scores.get(first, {}), scores.get(second, {})
        common = sorted(ours.keys() & theirs.keys())
        if common:
            difference = paired_difference(
                [ours[name].value for name in common],
                [theirs[name].value for name in common],
                seed,
                replicates,
                [ours[name].weight for name in common],
            )
            interval = Interval(*difference, len(common))
            summary.differences.append(Difference(metric.name, first, second, interval))


def _add_vbench_average(
    summary: Summary,
    found: Measurements,
    methods: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    resampling: Resampling,
) -> None:
    measured = [metric.name for metric in found.metrics]
    reason = why_not(measured, [*measured, *(skipped.name for skipped in found.skipped)])
    if reason is not None:
        found.skipped.append(reason)
    if not set(VBENCH_DIMENSIONS) <= set(measured):
        return

    def draws(method: str, videos: Sequence[str]) -> AverageDraws:
        return AverageDraws(of_method(found.scores, method), videos, resampling.seed, resampling.replicates)

    summary.metrics.append(ReadyMetric(VBENCH_AVERAGE, None, "", True, "as its five dimensions are"))
    for method in methods:
        own = complete_videos(found.scores, [method])
        if own:
            summary.intervals.setdefault(VBENCH_AVERAGE, {})[method] = draws(method, own).interval()
    for first, second in pairs:
        common = complete_videos(found.scores, [first, second])
        if common:
            interval = draws(first, common).difference(draws(second, common))
            summary.differences.append(Difference(VBENCH_AVERAGE, first, second, interval))
