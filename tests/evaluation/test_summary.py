"""The average of VBench's five dimensions over the same resamples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from luve_lightning.evaluation.bootstrap import KernelBootstrap, KernelTarget
from luve_lightning.evaluation.prepared_metrics import ReadyMetric, Skipped
from luve_lightning.evaluation.report import problem_lines
from luve_lightning.evaluation.result_cache import ResultCache, Score
from luve_lightning.evaluation.runner import Measurements
from luve_lightning.evaluation.summary import AverageDraws, Resampling, complete_videos, of_method, summarise, why_not
from luve_lightning.metrics.frechet_patch import FrechetClipDistance
from luve_lightning.metrics.vbench import VBENCH_DIMENSIONS
from tests.metrics.test_frechet_patch_clips import Means, statistics, video

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


@pytest.mark.parametrize("given", [True, False])
def test_a_kernel_distance_stands_beside_the_frechet_distance_of_the_same_features(tmp_path: Path, given: bool) -> None:
    """To a reference of its own, or to the originals."""
    metric = FrechetClipDistance(Means(), reference=statistics(range(20)) if given else None)
    metric.prepare("cpu")
    cache, found = ResultCache(tmp_path), Measurements([], [])
    seeds = {None: range(20), "near": range(100, 112), "far": range(200, 212)}
    features = {method: [metric.features(video(seed)) for seed in own] for method, own in seeds.items()}
    features["far"] = [rows + 40 for rows in features["far"]]
    found.metrics.append(ReadyMetric("fd_means", metric, "", False, ""))
    for method, rows in features.items():
        if method is not None or not given:
            keys = {f"{number:02}": f"{method}-{number:02}" for number in range(len(rows))}
            found.features.setdefault("fd_means", {})[method] = keys
            for (_, key), own in zip(keys.items(), rows, strict=True):
                cache.put_features(key, own)
    summary = summarise(found, cache, ["near", "far"], [("far", "near")], Resampling(3, 50, 5))
    assert not summary.problems
    assert [column.name for column in summary.metrics] == ["fd_means", "kd_means"]
    target = KernelTarget([torch.as_tensor(rows) for rows in features[None]])
    for method in ("near", "far"):
        assert summary.intervals["kd_means"][method] == KernelBootstrap(features[method], target, 3, 50).interval()
    [difference] = [one for one in summary.differences if one.metric == "kd_means"]
    assert 0 < difference.interval.low < difference.interval.high


def test_why_a_distance_is_missing_names_it_once(tmp_path: Path) -> None:
    metric = FrechetClipDistance(Means(), reference=statistics(range(20)))
    metric.prepare("cpu")
    cache, found = ResultCache(tmp_path), Measurements([ReadyMetric("fd_means", metric, "", False, "")], [])
    found.features["fd_means"] = {"alone": {"00": "key"}}
    cache.put_features("key", metric.features(video(0)))
    problems = summarise(found, cache, ["alone"], [], Resampling(3, 50, 5)).problems
    assert "alone, all of them, fd_means: needs at least 2 clips, got 1" in problem_lines(problems)
    assert str(Skipped("musiq", "musiq: pyiqa cannot load it")) == "musiq: pyiqa cannot load it"
