from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning.functional.pixels import frames_to_video, video_to_frames


def random_frames(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_definition() -> None:
    """Against the formula, one value at a time."""
    frames = random_frames(0, 2, 3, 5, 3)
    video = frames_to_video(frames)
    assert video.dtype == torch.float32
    assert video.shape == (3, 2, 3, 5)
    assert video.is_contiguous()
    for (t, h, w, c), value in np.ndenumerate(frames):
        assert video[c, t, h, w].item() == pytest.approx(int(value) / 127.5 - 1, abs=1e-6)


def test_ends_of_the_range() -> None:
    frames = np.zeros((1, 1, 2, 3), dtype=np.uint8)
    frames[..., 1, :] = 255
    assert frames_to_video(frames).unique().tolist() == [-1.0, 1.0]


def test_every_level_returns() -> None:
    frames = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert torch.equal(video_to_frames(frames_to_video(frames)), torch.from_numpy(frames))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=3, max_size=4), st.integers(0, 1000))
def test_round_trip_of_any_shape(shape: list[int], seed: int) -> None:
    frames = random_frames(seed, *shape, 3)
    video = frames_to_video(frames)
    assert video.shape == (*shape[:-3], 3, *shape[-3:])
    back = video_to_frames(video)
    assert back.is_contiguous()
    np.testing.assert_array_equal(back.numpy(), frames)


def test_rounds_to_the_nearest_and_clamps() -> None:
    step = 2 / 255
    inside = [-1 + 0.4 * step, -1 + 0.6 * step, 1 - 0.4 * step]
    values = torch.tensor([-7.0, *inside, 1.2, float("inf"), -float("inf")])
    video = values.view(1, 1, 1, 7).expand(3, 1, 1, 7)
    assert video_to_frames(video)[0, 0, :, 0].tolist() == [0, 0, 1, 255, 255, 255, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    """A level moves by no more than the precision rounds: bfloat16, half a level near -1 and 1."""
    frames = torch.from_numpy(random_frames(1, 2, 4, 4, 3))
    back = video_to_frames(frames_to_video(frames).to(dtype))
    assert back.dtype == torch.uint8
    assert (back.int() - frames.int()).abs().max() <= (1 if dtype == torch.bfloat16 else 0)


def test_flipped_and_read_only_frames() -> None:
    frames = random_frames(2, 3, 4, 4, 3)
    flipped = frames[::-1, :, ::-1]
    np.testing.assert_array_equal(video_to_frames(frames_to_video(flipped)).numpy(), flipped)
    frames.setflags(write=False)
    np.testing.assert_array_equal(video_to_frames(frames_to_video(frames)).numpy(), frames)


def test_input_is_left_alone() -> None:
    frames = torch.from_numpy(random_frames(3, 1, 2, 2, 3))
    video = frames_to_video(frames)
    kept, before = frames.clone(), video.clone()
    video_to_frames(video)
    assert torch.equal(frames, kept)
    assert torch.equal(video, before)


def test_gradients_end_at_the_frames() -> None:
    video = torch.zeros(3, 1, 2, 2, requires_grad=True)
    assert not video_to_frames(video).requires_grad


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(2, 4, 4, 3),
        torch.zeros(4, 4, 3, dtype=torch.uint8),
        torch.zeros(3, 2, 4, 4, dtype=torch.uint8),
    ],
)
def test_wrong_frames_are_named(frames: torch.Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"frames: expected uint8 \[B x\] T x H x W x 3, got (float32|uint8) \d"
    ):
        frames_to_video(frames)


@pytest.mark.parametrize(
    "video", [torch.zeros(2, 4, 4, 3), torch.zeros(3, 4, 4), torch.zeros(3, 1, 4, 4, dtype=torch.int64)]
)
def test_wrong_video_is_named(video: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"video: expected floating point \[B x\] 3 x T x H x W, got"):
        video_to_frames(video)


def test_not_a_number_is_refused() -> None:
    video = torch.zeros(3, 1, 2, 2)
    video[0, 0, 1, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        video_to_frames(video)
