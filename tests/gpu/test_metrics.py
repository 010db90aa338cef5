"""Measures of videos on a GPU against a CPU, and their memory at 4K."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from luve_lightning.metrics import ContentCompleted, ContentKept, DetailCoherence, OctaveDetail, Repetition, VideoMetric
from tests.helpers.scenes import panned, resized

METRICS = [Repetition(), ContentKept(), ContentCompleted(), OctaveDetail(), DetailCoherence()]


def beside(metric: VideoMetric, video: Tensor, motion: Tensor) -> Tensor:
    """The video that one is compared with: its original, darker, or its motion video."""
    return video // 2 if metric.full_reference else motion


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_gpus_value_is_a_cpus(device: torch.device, metric: VideoMetric) -> None:
    video = panned("astronaut", (1.3, 0.6), frames=3)
    other = beside(metric, video, resized(video, 64))
    expected = metric.score(video, other)
    metric.prepare(device)
    try:
        # TF32 in convolutions and products moves similarities by a thousandth.
        assert metric.score(video.to(device), other.to(device)) == pytest.approx(expected, abs=0.01)
    finally:
        metric.to("cpu")


@pytest.mark.only_gpu
@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_4k_takes_little_beside_the_frames(device: torch.device, metric: VideoMetric) -> None:
    video = panned("astronaut", (1.3, 0.6), frames=3).repeat(3, 17, 30, 1)[:, :2160, :3840].to(device)
    motion = video[:, ::2, ::2]
    metric.prepare(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    metric.score(video, beside(metric, video, motion))
    assert torch.cuda.max_memory_allocated(device) - before < 4 * 2**30
    metric.to("cpu")
