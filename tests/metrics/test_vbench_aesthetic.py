"""The aesthetic score, as VBench shrinks frames and by tiles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from torch import nn

from luve_lightning.metrics import Aesthetic, AestheticQuality
from tests.helpers.video_metrics import Head, Projection, random_video
from tests.metrics.test_vbench_consistency import CLIP_MEAN, CLIP_STD, CLIP_VIEW


def linear_head() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 1)


def test_a_videos_number_is_vbenchs() -> None:
    network, head = Projection(), linear_head()
    video = random_video(5, 250, 330)
    images = CLIP_VIEW(torch.Tensor(video.numpy()).permute(0, 3, 1, 2))
    features = network(images)
    scores = [head(feature / feature.norm()).item() / 10 for feature in features]
    assert AestheticQuality(network, head, batch_size=2).score(video) == pytest.approx(sum(scores) / 5, abs=1e-6)


def test_videos_count_alike() -> None:
    metric = AestheticQuality(Projection(), Head())
    videos = [random_video(2, seed=1), random_video(7, seed=2)]
    for video in videos:
        metric.update(video)
    assert metric.compute().item() == pytest.approx(sum(map(metric.score, videos)) / 2, abs=1e-12)


def test_tiles_of_some_frames_at_native_resolution() -> None:
    network, head = Projection(), linear_head()
    video = random_video(6, 448, 300)
    tiles = [
        video[frame, top : top + 224, 38:262].permute(2, 0, 1).float() / 255
        for frame in (1, 4)  # the middles of two halves
        for top in (0, 224)
    ]
    features = network(T.Normalize(CLIP_MEAN, CLIP_STD)(torch.stack(tiles)))
    expected = head(F.normalize(features)).mean().item() / 10
    metric = Aesthetic(network, head, frames=2, batch_size=3)
    assert metric.score(video) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match=r"^aesthetic: frames are 200x300, smaller than a tile of 224$"):
        metric.score(video[:, :200])
