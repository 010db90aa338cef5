"""A small extractor of patch features, and a Fréchet distance over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luve_lightning.functional.patches import PatchPlan
from luve_lightning.metrics.feature_moments import FeatureExtractor, FeatureStatistics
from luve_lightning.metrics.frame_networks import resize_clean
from luve_lightning.metrics.frechet_patch import FrechetPatchDistance
from tests.helpers.resumable import Run

PLAN = PatchPlan(size=24, placement="both", per_frame=3, frames=4, seed=5)


def stub_network(dim: int = 6) -> nn.Sequential:
    """A random network for 299x299 pixels in [0, 255], N x 3 x 299 x 299 to N x dim."""
    network = nn.Sequential(nn.Conv2d(3, dim, 16, stride=16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    random = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random) / 100
    return network.eval()


class StubFeatures(FeatureExtractor):
    """`stub_network` after clean-fid's resize."""

    kind = "stub"
    name = "stub-1"
    dim = 6
    resolution = "299x299"

    def __init__(self) -> None:
        super().__init__()
        self.network = stub_network(self.dim)

    def forward(self, patches: Tensor) -> Tensor:
        return self.network(resize_clean(patches))


def stub_video(seed: int, frames: int = 7, height: int = 50, width: int = 77) -> Tensor:
    """Coarse random squares with noise, T x H x W x 3; brightness and contrast vary with the seed."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (frames, -(-height // 5), -(-width // 5), 3))
    fine = coarse.repeat(5, axis=1).repeat(5, axis=2)[:, :height, :width]
    noisy = random.uniform(0.3, 1) * fine + random.normal(random.uniform(-20, 40), 15, fine.shape)
    return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8))


def stub_metric(**kwargs: Any) -> FrechetPatchDistance:
    """On the CPU, with statistics of five videos as its reference."""
    metric = FrechetPatchDistance(PLAN, StubFeatures(), **kwargs)
    metric.prepare("cpu")
    for seed in range(100, 105):
        metric.update(stub_video(seed), key=str(seed))
    metric.use_reference(FeatureStatistics(metric.moments, PLAN, "stub-1", "videos", "0" * 64, 5))
    metric.reset()
    return metric


def distance_of_shard(run: Run) -> None:
    """Each process measures its own videos; all save what `compute` says."""
    rank = 0
    if run.processes > 1:
        import os

        rank = int(os.environ["LOCAL_RANK"])
        torch.distributed.init_process_group("gloo", rank=rank, world_size=run.processes)
    metric = stub_metric()
    for seed in run.task["shards"][rank]:
        metric.update(stub_video(seed), key=str(seed))
    value = metric.compute()
    folder = Path(run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"value": value, "own": metric.feature_count}, folder / f"rank-{rank}.pt")
    if run.processes > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
