"""The average of VBench's five dimensions over the same resamples."""

from __future__ import annotations

import numpy as np
import pytest

from luve_lightning.evaluation.result_cache import Score
from luve_lightning.evaluation.summary import AverageDraws, complete_videos, of_method, why_not
from luve_lightning.metrics.vbench import VBENCH_DIMENSIONS

VIDEOS = ["a", "b", "c", "d"]


def scores(seed: int) -> dict[str, dict[str, Score]]:
    rng = np.random.default_rng(seed)
    return {
        name: {video: Score(rng.random(), float(rng.integers(1, 4)), {}) for video in VIDEOS}
        for name in VBENCH_DIMENSIONS
    }


def test_each_resample_has_the_same_videos_in_every_dimension() -> None:
    own, replicates = scores(0), 60
    result = AverageDraws(own, VIDEOS, seed=5, replicates=replicates)
    rng, expected = np.random.default_rng(5), []
    for _ in range(replicates):
        drawn = [VIDEOS[i] for i in rng.integers(4, size=4)]
        means = [
            np.average([own[n][v].value for v in drawn], weights=[own[n][v].weight for v in drawn])
            for n in VBENCH_DIMENSIONS
        ]
        expected.append(np.mean(means))
    interval = result.interval()
    assert (interval.low, interval.high) == pytest.approx(tuple(np.percentile(expected, [2.5, 97.5])))
    assert interval.low < interval.value < interval.high
    other = AverageDraws(scores(1), VIDEOS, seed=5, replicates=replicates)
    difference = result.difference(other)
    assert difference.value == pytest.approx(interval.value - other.interval().value)
    assert difference.low < difference.value < difference.high


def test_only_videos_with_all_five_count() -> None:
    found = {name: {"m": values, "n": dict(values)} for name, values in scores(0).items()}
    del found["imaging_quality"]["n"]["b"]
    assert complete_videos(found, ["m"]) == VIDEOS
    assert complete_videos(found, ["m", "n"]) == ["a", "c", "d"]
    assert complete_videos(found, ["x"]) == []
    assert of_method(found, "m")["imaging_quality"].keys() == set(VIDEOS)


def test_why_there_is_none() -> None:
    assert why_not(VBENCH_DIMENSIONS, VBENCH_DIMENSIONS) is None
    assert why_not(["psnr_rgb"], ["psnr_rgb", "dover"]) is None, "nobody asked for it"
    reason = why_not(VBENCH_DIMENSIONS[1:], VBENCH_DIMENSIONS)
    assert reason is not None
    assert str(reason) == "vbench_average: needs all five dimensions, missing: subject_consistency"
