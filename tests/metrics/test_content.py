"""What is kept of a motion video and what is completed: each made case has its value."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luve_lightning.metrics import ContentCompleted, ContentKept
from luve_lightning.metrics.content import MotionMetric
from tests.helpers.scenes import enlarged, noisy, photograph, resized

PHOTOGRAPHS = ("astronaut", "cat", "rocket")


def scores(video: Tensor, motion: Tensor) -> tuple[float, float]:
    return ContentKept().score(video, motion), ContentCompleted().score(video, motion)


@pytest.mark.parametrize("side", [96, 64])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_the_true_video_is_kept_and_completed_the_enlarged_one_only_kept(name: str, side: int) -> None:
    true = photograph(name, frames=2)
    motion = resized(true, side)
    kept, completed = scores(true, motion)
    assert kept > 0.99
    assert completed > 0.1
    for filtered in (enlarged(motion, 192), enlarged(motion, 192, "bilinear"), resized(motion, 192)):
        kept, passive = scores(filtered, motion)
        assert kept > 0.98
        assert passive < 0.1
        assert 3 * passive < completed


def test_another_scene_keeps_nothing() -> None:
    motions = {name: resized(photograph(name), 96) for name in PHOTOGRAPHS}
    for name in PHOTOGRAPHS:
        for other in set(PHOTOGRAPHS) - {name}:
            assert ContentKept().score(photograph(name), motions[other]) < 0.15
    assert ContentKept().score(photograph("cat").flip(2), motions["cat"]) < 0.2


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("deviation", [4.0, 16.0])
def test_noise_completes_nothing(name: str, deviation: float) -> None:
    """It has more power beyond the motion's grid than the true detail, and counts as none."""
    true = photograph(name, frames=8)
    motion = resized(true, 96)
    completed = ContentCompleted()
    detail, passive = (completed.score(video, motion) for video in (true, enlarged(motion, 192)))
    assert completed.score(noisy(enlarged(motion, 192), deviation), motion) < passive + 0.25 * (detail - passive)
    assert completed.score(noisy(true, deviation), motion) == pytest.approx(detail, rel=0.25)
    assert ContentKept().score(noisy(true, deviation), motion) < ContentKept().score(true, motion)


def test_a_part_completed_is_a_part() -> None:
    true = photograph("astronaut")
    motion = resized(true, 96)
    passive = enlarged(motion, 192)
    completed = [
        ContentCompleted().score((true * part + passive * (1 - part)).round().to(torch.uint8), motion)
        for part in (0.0, 0.5, 0.75, 1.0)
    ]
    assert completed == sorted(completed)


def test_flat_videos_have_values() -> None:
    black = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    assert scores(black, black[:, :32, :32]) == (1.0, 0.0)
    assert scores(black + 9, black[:, :32, :32]) == (pytest.approx(1), pytest.approx(0, abs=1e-3))
    assert ContentKept().score(noisy(black + 90, 30), black[:, :32, :32]) < 0.01


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(PHOTOGRAPHS), st.sampled_from([48, 61, 96]), st.booleans(), st.booleans())
def test_length_mirroring_and_turning_change_nothing(name: str, side: int, mirror: bool, turn: bool) -> None:
    true = photograph(name)
    motion = resized(true, side)

    def changed(frames: Tensor) -> Tensor:
        frames = frames.expand(3, -1, -1, -1)
        frames = frames.flip(2) if mirror else frames
        return frames.transpose(1, 2) if turn else frames

    for one, other in zip(scores(true, motion), scores(changed(true), changed(motion)), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


@settings(max_examples=10, deadline=None)
@given(st.integers(4, 40), st.integers(4, 40), st.integers(0, 30), st.integers(0, 30))
def test_any_sizes(rows: int, columns: int, down: int, across: int) -> None:
    generator = torch.Generator().manual_seed(0)
    motion = torch.randint(0, 256, (2, rows, columns, 3), dtype=torch.uint8, generator=generator)
    video = torch.randint(0, 256, (2, rows + down, columns + across, 3), dtype=torch.uint8, generator=generator)
    assert 0 <= ContentKept().score(video, motion) <= 1
    if down + across:
        assert 0 <= ContentCompleted().score(video, motion) < 100


@pytest.mark.parametrize("metric", [ContentKept(), ContentCompleted()])
def test_a_motion_video_that_does_not_belong_is_one_line(metric: MotionMetric) -> None:
    video = photograph("cat", 64, frames=3)
    with pytest.raises(ValueError, match=rf"^{metric.name}: compares with the motion video, and none was given$"):
        metric.score(video)
    with pytest.raises(ValueError, match=rf"^{metric.name}: the motion video must be uint8 T x H x W x 3, got float32"):
        metric.score(video, video.float())
    for wrong in (video[:2, :32, :32], photograph("cat", 65, frames=3)):
        with pytest.raises(ValueError, match=rf"^{metric.name}: the motion video must have the video's frames and be"):
            metric.score(video, wrong)
    with pytest.raises(ValueError, match=r"^frames: expected at least 1, got 0$"):
        type(metric)(frames=0)


def test_what_has_no_answer_is_one_line() -> None:
    video = photograph("cat", 64)
    with pytest.raises(ValueError, match=r"^content_completed: the video is as large as its motion video, 64x64: noth"):
        ContentCompleted().score(video, video)
    with pytest.raises(ValueError, match=r"^content_kept: a motion video of 3x64 has no octave to compare, 4x4 is the"):
        ContentKept().score(video, video[:, :3])
