"""A Fréchet distance for every method, with intervals and differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from luve_lightning.evaluation.bootstrap import Distance, FrechetBootstrap, Originals
from luve_lightning.evaluation.measures import Measure
from luve_lightning.evaluation.result_cache import ResultCache
from luve_lightning.evaluation.runner import Measurements, Problem
from luve_lightning.evaluation.summary_table import Difference, Resampling, Summary

_ALL = "all of them"


class DistanceColumn:
    """One Fréchet distance for all methods.

    Args:
        summary: gets what is computed.
        measure: the distance.
        found: where the features of each video are.
        cache: the features.
        resampling: how intervals are made.
        advance: told of every distance of a resample.
    """

    def __init__(
        self,
        summary: Summary,
        measure: Measure,
        found: Measurements,
        cache: ResultCache,
        resampling: Resampling,
        advance: Callable[[], None],
    ) -> None:
        assert measure.frechet is not None
        self.summary, self.measure, self.metric, self.cache = summary, measure, measure.frechet, cache
        self.resampling, self.advance = resampling, advance
        self.keys = found.features.get(measure.name, {})
        self.originals: dict[str, Tensor] = {}
        self.bootstraps: dict[tuple[str, tuple[str, ...]], FrechetBootstrap] = {}

    def add(self, methods: Sequence[str], pairs: Sequence[tuple[str, str]]) -> None:
        """Add the column to the summary."""
        name = self.measure.name
        if self.measure.needs_originals_features:
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
            raise FileNotFoundError(
                f"{self.cache.folder}: features of {video} have gone meanwhile; run again"
            )
        return features

    def _bootstrap(self, method: str, videos: list[str]) -> FrechetBootstrap:
        """Of these videos of a method, once."""
        key = (method, tuple(videos))
        if key not in self.bootstraps:
            distance: Distance = lambda moments, counts: self.metric.distance(moments)  # noqa: E731
            if self.originals:
                distance = Originals(self.originals, videos).distance
            features = [self._features(method, video) for video in videos]
            seed, replicates = self.resampling.seed, self.resampling.frechet_replicates
            self.bootstraps[key] = FrechetBootstrap(features, distance, seed, replicates, self.advance)
        return self.bootstraps[key]
