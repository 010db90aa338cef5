"""Small networks in place of the published ones, small videos, and metrics measured in several processes."""

from __future__ import annotations

import json
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from luve_lightning import metrics
from luve_lightning.metrics import VideoMetric
from tests.helpers.resumable import Run


class Projection(nn.Module):
    """Mean colours of a 4 x 4 grid through a fixed random matrix: any size of image to `features` numbers."""

    def __init__(self, features: int = 8) -> None:
        super().__init__()
        matrix = torch.randn(48, features, generator=torch.Generator().manual_seed(features)) / 7
        self.matrix = nn.Parameter(matrix)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape))
        return nn.functional.adaptive_avg_pool2d(images, 4).flatten(1) @ self.matrix


class Brightness(nn.Module):
    """A video's mean in [0, 1]."""

    def forward(self, frames: Tensor) -> Tensor:
        return frames.float().mean() / 255


class Head(nn.Module):
    """A tenth of the sum, and 5: N x D to N x 1."""

    def forward(self, features: Tensor) -> Tensor:
        return 5 + features.sum(1, keepdim=True) / 10


def random_video(frames: int = 3, height: int = 40, width: int = 60, seed: int = 0) -> Tensor:
    """uint8 T x H x W x 3 noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=generator)


def all_metrics() -> dict[str, VideoMetric]:
    """Every metric of a mean over videos that can be given its network, by name."""
    found: list[VideoMetric] = [
        metrics.TemporalFlickering(),
        metrics.SubjectConsistency(Projection()),
        metrics.BackgroundConsistency(Projection(), by_frames=False),
        metrics.AestheticQuality(Projection(), Head()),
        metrics.ImagingQuality(Projection(1)),
        metrics.Musiq(resized=True, backbone=Projection(1)),
        metrics.Niqe(backbone=Projection(2)),
        metrics.Dover(Brightness()),
        metrics.PsnrRgb(),
        metrics.Ssim(),
        metrics.SpectralDistance(),
        metrics.HighFrequencyShare(),
        metrics.Repetition(side=96),
        metrics.OctaveDetail(),
        metrics.DetailCoherence(),
    ]
    return {metric.name: metric for metric in found}


def means(seeds: list[int]) -> dict[str, float]:
    """The mean of every metric over videos of different lengths: a mean over frames is not one over videos."""
    found = all_metrics()
    for seed in seeds:
        video, original = (random_video(2 + seed, seed=10 * seed + i) for i in range(2))
        for metric in found.values():
            metric.update(video, original if metric.full_reference else None)
    return {name: metric.compute().item() for name, metric in found.items()}


def measure(run: Run) -> None:
    """Measure this process's share of the videos, in each way to share them (`task`); rank 0 writes the means."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, timeout=timedelta(seconds=150))
    measured = {name: means(shards[rank]) for name, shards in run.task.items()}
    if rank == 0:
        (run.folder / "means.json").write_text(json.dumps(measured))
    dist.barrier()  # nobody leaves while another still waits for it
    dist.destroy_process_group()
