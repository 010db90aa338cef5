"""The average of VBench's five dimensions as a column of its own, with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from luve_lightning.evaluation.bootstrap import Interval, percentiles, resampled_means
from luve_lightning.evaluation.measures import Skipped
from luve_lightning.evaluation.result_cache import Score
from luve_lightning.metrics.vbench_average import VBENCH_DIMENSIONS, vbench_average

NAME = "vbench_average"
Scores = Mapping[str, Mapping[str, Mapping[str, Score]]]


class AverageDraws:
    """The average of one method over some videos, and of resamples of them: of all dimensions the same videos.

    Args:
        scores: of the method, by dimension and video.
        videos: which ones.
        seed: of the resampling.
        replicates: how often the videos are drawn anew.
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
        """This average minus the other's, of the same videos in the same order."""
        ends = percentiles(self.draws - other.draws, self.videos)
        return Interval(self.value - other.value, *ends, self.videos)


def of_method(scores: Scores, method: str) -> dict[str, Mapping[str, Score]]:
    """A method's scores by dimension."""
    return {name: scores.get(name, {}).get(method, {}) for name in VBENCH_DIMENSIONS}


def complete_videos(scores: Scores, methods: Sequence[str]) -> list[str]:
    """The videos of which every method has all five dimensions."""
    sets = [found.keys() for method in methods for found in of_method(scores, method).values()]
    return sorted(set.intersection(*map(set, sets)))


def why_not(measured: Sequence[str], wanted: Sequence[str]) -> Skipped | None:
    """Why there is no average, when some of the dimensions were asked for.

    Args:
        measured: the columns that ran.
        wanted: the columns that ran or were to run.
    """
    missing = [name for name in VBENCH_DIMENSIONS if name not in measured]
    if not missing or not set(wanted) & set(VBENCH_DIMENSIONS):
        return None
    return Skipped(NAME, f"needs all five dimensions, missing: {', '.join(missing)}")
