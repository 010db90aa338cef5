"""Subject and background consistency, by hand and against VBench's loop over frames."""

from __future__ import annotations

import pytest
import torch
import torchvision.transforms as T
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from luve_lightning.functional.fidelity import frame_consistency
from luve_lightning.metrics import (
    BackgroundConsistency,
    BackgroundConsistencyTiles,
    SubjectConsistency,
    SubjectConsistencyTiles,
)
from tests.helpers.video_metrics import Projection, random_video

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DINO_VIEW = T.Compose(
    [T.Resize(224, antialias=False), T.Lambda(lambda x: x.float().div(255.0)), T.Normalize(MEAN, STD)]
)
CLIP_VIEW = T.Compose(
    [
        T.Resize(224, interpolation=T.InterpolationMode.BICUBIC, antialias=False),
        T.CenterCrop(224),
        T.Lambda(lambda x: x.float().div(255.0)),
        T.Normalize(CLIP_MEAN, CLIP_STD),
    ]
)


class Table(nn.Module):
    """Features that are given, one vector an image in the order that images come."""

    def __init__(self, features: list[list[float]]) -> None:
        super().__init__()
        self.features, self.next = torch.tensor(features), 0

    def forward(self, images: Tensor) -> Tensor:
        first, self.next = self.next, self.next + len(images)
        return self.features[first : self.next]


def by_loop(features: Tensor) -> tuple[float, int]:
    """Sum of VBench's similarities over a video's frames, and how many there are."""
    total = 0.0
    for i in range(1, len(features)):
        with_previous, with_first = (
            max(0.0, torch.cosine_similarity(features[j][None], features[i][None]).item()) for j in (i - 1, 0)
        )
        total += (with_previous + with_first) / 2
    return total, len(features) - 1


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ([[1, 2], [1, 2], [3, 6]], 1.0),  # the same direction
        ([[1, 0], [0, 1]], 0.0),  # orthogonal
        ([[1, 0], [0, 1], [-1, 0]], 0.0),  # opposite to the first: no less than 0
        ([[1, 0], [0, 1], [1, 0]], ((0 + 0) / 2 + (0 + 1) / 2) / 2),
        ([[1, 0], [-1, 0], [-1, 0]], ((0 + 0) / 2 + (1 + 0) / 2) / 2),  # each is clamped by itself
        ([[1, 0], [1, 1], [0, 1]], (0.5**0.5 + (0.5**0.5 + 0) / 2) / 2),
    ],
)
@pytest.mark.parametrize("metric", [SubjectConsistency, BackgroundConsistency])
def test_hand_computed_features(metric: type[SubjectConsistency], features: list[list[float]], expected: float) -> None:
    measured = metric(Table(features), batch_size=2)
    assert measured.score(random_video(len(features))) == pytest.approx(expected, abs=1e-7)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 2**31))
def test_vbenchs_loop(frames: int, features: int, seed: int) -> None:
    vectors = torch.randn(frames, features, generator=torch.Generator().manual_seed(seed))
    total, pairs = by_loop(vectors)
    assert frame_consistency(vectors).item() == pytest.approx(total / pairs, abs=1e-6)
    stacked = frame_consistency(torch.stack([vectors, vectors.flip(0)]))
    assert stacked.shape == (2,)
    assert stacked[0] == frame_consistency(vectors)


@pytest.mark.parametrize(("metric", "view"), [(SubjectConsistency, DINO_VIEW), (BackgroundConsistency, CLIP_VIEW)])
@pytest.mark.parametrize(("height", "width"), [(36, 64), (225, 300), (301, 250)])
def test_a_videos_number_is_vbenchs(metric: type[SubjectConsistency], view: T.Compose, height: int, width: int) -> None:
    """torchvision's transforms as VBench 0.1.5 sets them, its loop, and one network."""
    network = Projection()
    video = random_video(5, height, width)
    images = view(torch.Tensor(video.numpy()).permute(0, 3, 1, 2))
    total, pairs = by_loop(network(images))
    assert metric(network, batch_size=3).score(video) == pytest.approx(total / pairs, abs=1e-6)
    assert network.seen[1:] == [(3, *images.shape[1:]), (2, *images.shape[1:])]


@pytest.mark.parametrize("metric", [SubjectConsistency, BackgroundConsistency])
def test_the_mean_weighs_as_vbench_does(metric: type[SubjectConsistency]) -> None:
    """One process: the sum of all frames' similarities by their number. Several GPUs (SC): the mean of videos."""
    videos = [random_video(2, 30, 50, seed=1), random_video(6, 50, 30, seed=2)]
    by_frames, by_videos = metric(Projection()), metric(Projection(), by_frames=False)
    for video in videos:
        by_frames.update(video)
        by_videos.update(video)
    scores = [by_frames.score(video) for video in videos]
    assert abs(scores[0] - scores[1]) > 1e-3
    assert by_frames.compute().item() == pytest.approx((scores[0] + 5 * scores[1]) / 6, abs=1e-12)
    assert by_videos.compute().item() == pytest.approx((scores[0] + scores[1]) / 2, abs=1e-12)


@pytest.mark.parametrize("metric", [SubjectConsistency, BackgroundConsistency])
def test_identical_frames_are_wholly_consistent(metric: type[SubjectConsistency]) -> None:
    still = random_video(1).expand(4, -1, -1, -1)
    assert metric(Projection()).score(still) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("metric", "mean", "std"), [(SubjectConsistencyTiles, MEAN, STD), (BackgroundConsistencyTiles, CLIP_MEAN, CLIP_STD)]
)
def test_tiles_are_native_pixels_in_their_place(
    metric: type[SubjectConsistencyTiles], mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    network = Projection()
    video = random_video(3, 230, 500)
    expected = []
    for left in (0, 276):  # two fit side by side: from edge to edge
        tile = video[:, 3:227, left : left + 224].permute(0, 3, 1, 2).float() / 255
        total, pairs = by_loop(network(T.Normalize(mean, std)(tile)))
        expected.append(total / pairs)
    measured = metric(network, batch_size=4)
    assert measured.score(video) == pytest.approx(sum(expected) / 2, abs=1e-6)
    assert network.seen[2:] == [(4, 3, 224, 224), (2, 3, 224, 224)]
    assert measured.name.endswith("_tiles")
    with pytest.raises(ValueError, match=r"^\w+_tiles: frames are 223x500, smaller than a tile of 224$"):
        measured.score(video[:, :223])


def test_detail_that_vbenchs_view_skips_is_seen_by_tiles() -> None:
    """Of 1120 rows its bilinear resize reads 448: the other pixels may flicker as they like."""
    read = {round(row) for i in range(224) for row in ((i + 0.5) * 5 - 0.5,)}
    skipped = torch.tensor([row for row in range(1120) if row not in read])
    video = random_video(1, 1120, 1120).expand(3, -1, -1, -1).clone()
    for frame in range(3):
        video[frame, skipped] = random_video(1, len(skipped), 1120, seed=frame)[0]
    assert SubjectConsistency(Projection()).score(video) == pytest.approx(1, abs=1e-6)
    assert SubjectConsistencyTiles(Projection()).score(video) < 0.9999


def test_features_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^subject_consistency: backbone must give N x D features, got shape"):
        SubjectConsistency(nn.Identity()).score(random_video())
    with pytest.raises(ValueError, match=r"^SubjectConsistency.batch_size: expected at least 1, got 0$"):
        SubjectConsistency(Projection(), batch_size=0)
    with pytest.raises(ValueError, match="T at least 2"):
        frame_consistency(torch.ones(1, 3))
