"""From results of videos to rows of a table: means, Fréchet distances and differences, each with its interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from luve_lightning.evaluation.bootstrap import Interval, mean_interval, paired_difference
from luve_lightning.evaluation.frechet_summary import DistanceColumn
from luve_lightning.evaluation.measures import Measure
from luve_lightning.evaluation.result_cache import ResultCache, Score
from luve_lightning.evaluation.runner import Measurements
from luve_lightning.evaluation.summary_table import Difference, Resampling, Summary
from luve_lightning.evaluation.vbench_summary import NAME as AVERAGE
from luve_lightning.evaluation.vbench_summary import AverageDraws, complete_videos, of_method, why_not
from luve_lightning.metrics.vbench_average import VBENCH_DIMENSIONS


def summarise(
    found: Measurements,
    cache: ResultCache,
    methods: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    resampling: Resampling,
    advance: Callable[[], None] = lambda: None,
) -> Summary:
    """Put the results of all videos together.

    Args:
        found: the results.
        cache: where the features are.
        methods: in the table's order.
        pairs: methods to compare, the second is subtracted from the first.
        resampling: how intervals are made.
        advance: told of every Fréchet distance of a resample, see `distances`.
    """
    summary = Summary(list(found.measures))
    for measure in found.measures:
        if measure.frechet is None:
            _add_means(summary, measure, found.scores.get(measure.name, {}), methods, pairs, resampling)
        else:
            DistanceColumn(summary, measure, found, cache, resampling, advance).add(methods, pairs)
    _add_vbench_average(summary, found, methods, pairs, resampling)
    return summary


def distances(found: Measurements, methods: Sequence[str], resampling: Resampling) -> int:
    """About how many Fréchet distances `summarise` computes."""
    sets = [measure for measure in found.measures if measure.frechet is not None]
    return len(sets) * len(methods) * resampling.frechet_replicates


def _add_means(
    summary: Summary,
    measure: Measure,
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
            summary.intervals.setdefault(measure.name, {})[method] = interval
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
            summary.differences.append(Difference(measure.name, first, second, interval))


def _add_vbench_average(
    summary: Summary,
    found: Measurements,
    methods: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    resampling: Resampling,
) -> None:
    measured = [measure.name for measure in found.measures]
    reason = why_not(measured, [*measured, *(skipped.name for skipped in found.skipped)])
    if reason is not None:
        found.skipped.append(reason)
    if not set(VBENCH_DIMENSIONS) <= set(measured):
        return

    def draws(method: str, videos: Sequence[str]) -> AverageDraws:
        return AverageDraws(of_method(found.scores, method), videos, resampling.seed, resampling.replicates)

    summary.measures.append(Measure(AVERAGE, None, "", True, "as its five dimensions are"))
    for method in methods:
        own = complete_videos(found.scores, [method])
        if own:
            summary.intervals.setdefault(AVERAGE, {})[method] = draws(method, own).interval()
    for first, second in pairs:
        common = complete_videos(found.scores, [first, second])
        if common:
            interval = draws(first, common).difference(draws(second, common))
            summary.differences.append(Difference(AVERAGE, first, second, interval))
