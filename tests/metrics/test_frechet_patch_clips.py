"""Distances and nearest neighbours of whole clips: copies of training clips are told from new ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from luve_lightning.metrics.feature_moments import FeatureExtractor, FeatureMoments, FeatureStatistics
from luve_lightning.metrics.frechet_patch import DataCopying, FrechetClipDistance


class Means(FeatureExtractor):
    """Mean colours of a clip's first and last frame, and of all."""

    kind, name, dim, resolution = "means", "means-1", 9, "its own size"

    def forward(self, patches: Tensor) -> Tensor:
        """uint8 B x T x H x W x 3 to float32 B x 9."""
        colours = patches.float().mean((2, 3))
        return torch.cat([colours[:, 0], colours[:, -1], colours.mean(1)], 1)


def video(seed: int, frames: int = 17) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, 2, 2, 3), generator=generator, dtype=torch.uint8)


def statistics(seeds: range) -> FeatureStatistics:
    metric = FrechetClipDistance(Means())
    metric.prepare("cpu")
    rows = torch.cat([metric.features(video(seed)) for seed in seeds])
    about = {"plan": metric.patches, "extractor": "means-1", "source": "videos", "source_hash": "0", "files": len(rows)}
    return FeatureStatistics(FeatureMoments.from_features(rows), rows=rows, lengths=(1,) * len(rows), **about)


def test_longer_videos_are_cut_and_each_is_one_vector() -> None:
    metric = FrechetClipDistance(Means(), frames=17, reference=statistics(range(40)), against="training")
    metric.prepare("cpu")
    long = video(1, 33)
    assert torch.equal(metric.features(long), metric.features(long[:17]))
    for seed in range(40):
        metric.update(video(seed))
    assert metric.compute() == pytest.approx(0, abs=1e-6)
    assert (metric.name, metric.kernel_name) == ("fd_means_training", "kd_means_training")


def test_too_few_frames_and_too_few_clips_are_told(tmp_path: Path) -> None:
    class NineFrames(Means):
        least_frames = 9

    metric = FrechetClipDistance(NineFrames(), reference=statistics(range(5)))
    metric.prepare("cpu")
    metric.update(video(0))
    with pytest.raises(ValueError, match=r"^fd_means: needs at least 2 clips, got 1$"):
        metric.compute()
    with pytest.raises(ValueError, match=r"^fd_means: needs at least 9 frames of a video, got 8 of 2x2$"):
        metric.update(video(1, 8))
    statistics(range(5)).save(tmp_path / "clips")
    copying = DataCopying(NineFrames(), tmp_path / "clips", tmp_path / "clips")
    with pytest.raises(ValueError, match=r"^data_copying: needs at least 9 frames of a video, got 8 of 2x2$"):
        copying.update(video(1, 8))


def test_a_kernel_s_reference_keeps_its_features(tmp_path: Path) -> None:
    saved = statistics(range(5))
    saved.save(tmp_path / "with.safetensors")
    loaded = FeatureStatistics.load(tmp_path / "with.safetensors")
    assert loaded.rows is not None
    assert torch.equal(loaded.rows, saved.rows)
    assert loaded.lengths == (1,) * 5
    bare = FeatureStatistics(saved.moments, saved.plan, "means-1", "videos", "0", 5)
    FrechetClipDistance(Means(), reference=bare, kernel=False).prepare("cpu")
    with pytest.raises(ValueError, match="kd_means: reference statistics of videos hold no features"):
        FrechetClipDistance(Means(), reference=bare).prepare("cpu")


@pytest.mark.parametrize(("seeds", "low", "high"), [(range(60), 0.99, 1), (range(900, 960), 0.35, 0.65)])
def test_copies_are_told_from_new_videos(tmp_path: Path, seeds: range, low: float, high: float) -> None:
    """A model that returns its training clips has 1; one whose clips are as new as the unseen ones about 0.5."""
    for which, own in (("training", range(100)), ("unseen", range(500, 600))):
        statistics(own).save(tmp_path / which)
    metric = DataCopying(Means(), tmp_path / "training", tmp_path / "unseen")
    for seed in seeds:
        metric.update(video(seed))
    assert low <= metric.compute() <= high


def test_what_is_unlike_any_clip_has_nought(tmp_path: Path) -> None:
    for which, own in (("training", range(100)), ("unseen", range(500, 600))):
        statistics(own).save(tmp_path / which)
    metric = DataCopying(Means(), tmp_path / "training", tmp_path / "unseen")
    assert metric.score(torch.zeros(17, 2, 2, 3, dtype=torch.uint8)) == 0
    with pytest.raises(FileNotFoundError, match="nowhere"):
        DataCopying(Means(), tmp_path / "nowhere", tmp_path / "unseen").score(video(0))
