"""Downscaling of pixels against a plain implementation of the filter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from luve_lightning.functional import pixels as resize
from luve_lightning.functional.pixels import (
    center_crop_box,
    crop_frames,
    fit_frames,
    fit_window,
    frames_to_video,
    resize_frames,
    resize_video,
    video_to_frames,
)


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
    [torch.zeros(2, 4, 4, 3), torch.zeros(4, 4, 3, dtype=torch.uint8), torch.zeros(3, 2, 4, 4, dtype=torch.uint8)],
)
def test_wrong_frames_are_named(frames: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"frames: expected uint8 \[B x\] T x H x W x 3, got (float32|uint8) \d"):
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


def keys_kernel(x: float) -> float:
    """Keys' cubic with a = -0.5."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    if x < 2:
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return 0.0


def resize_matrix(n_in: int, n_out: int) -> np.ndarray:
    """Weights of every input for every output, the kernel widened by the scale when downscaling."""
    scale = n_in / n_out
    wide = max(scale, 1.0)
    matrix = np.array([[keys_kernel((j + 0.5 - (i + 0.5) * scale) / wide) for j in range(n_in)] for i in range(n_out)])
    return matrix / matrix.sum(axis=1, keepdims=True)


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@settings(max_examples=40, deadline=None)
@given(h=st.integers(1, 24), w=st.integers(1, 24), out_h=st.integers(1, 24), out_w=st.integers(1, 24))
def test_equals_the_plain_filter(h: int, w: int, out_h: int, out_w: int) -> None:
    video = noise(2, 3, 2, h, w)
    want = np.einsum("yh,bcthw,xw->bctyx", resize_matrix(h, out_h), video.numpy(), resize_matrix(w, out_w))
    got = resize_video(video, (out_h, out_w))
    assert got.shape == (2, 3, 2, out_h, out_w)
    np.testing.assert_allclose(got.numpy(), want.clip(-1, 1), atol=2e-5)


def test_is_pillows_bicubic_up_to_rounding() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    want = np.asarray(Image.fromarray(frame).resize((30, 20), Image.Resampling.BICUBIC), dtype=np.float32)
    got = resize_frames(torch.from_numpy(frame)[None], (20, 30))
    got_255 = (got[:, 0].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(got_255 - want).max() <= 1.0


def test_few_frames_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    video = noise(2, 3, 5, 30, 40)
    whole = resize_video(video, (20, 26))
    monkeypatch.setattr(resize, "_CHUNK_VALUES", 2 * 3 * 30 * 40)
    assert torch.equal(resize_video(video, (20, 26)), whole)


def test_overshoot_is_clamped() -> None:
    video = torch.ones(1, 1, 1, 8, 8)
    video[..., :4] = -1
    got = resize_video(video, (8, 5))
    assert got.abs().max() <= 1
    assert np.abs(resize_matrix(8, 5) @ video[0, 0, 0, 0].numpy()).max() > 1, "the filter alone would overshoot"


def test_same_size_is_the_same_tensor() -> None:
    video = noise(1, 3, 2, 8, 8)
    assert resize_video(video, (8, 8)) is video


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept_and_the_filter_runs_in_float32(dtype: torch.dtype) -> None:
    video = noise(1, 3, 2, 12, 12).to(dtype)
    got = resize_video(video, (8, 6))
    assert got.dtype == dtype
    assert torch.equal(got, resize_video(video.float(), (8, 6)).to(dtype))


def test_gradients_flow() -> None:
    video = noise(1, 3, 2, 12, 12).mul(0.5).requires_grad_()
    resize_video(video, (8, 6)).sum().backward()
    assert video.grad is not None
    assert video.grad.abs().sum() > 0


@pytest.mark.parametrize(("shape", "size"), [((3, 2, 8, 8), (4, 4)), ((1, 3, 2, 8, 8), (0, 4))])
def test_impossible_sizes_are_refused(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        resize_video(torch.zeros(shape), size)


@given(data=st.data(), th=st.integers(1, 60), tw=st.integers(1, 60))
def test_crop_is_the_largest_centred_box_of_the_aspect(data: st.DataObject, th: int, tw: int) -> None:
    height, width = data.draw(st.integers(th, 200)), data.draw(st.integers(tw, 200))
    top, left, h, w = center_crop_box(height, width, (th, tw))
    assert th <= h <= height
    assert tw <= w <= width
    assert h == height or w == width
    assert abs(2 * top + h - height) <= 1
    assert abs(2 * left + w - width) <= 1
    # The free side is the nearest whole number to the exact aspect ratio.
    assert min(abs(w - h * tw / th), abs(h - w * th / tw)) <= 0.5


@pytest.mark.parametrize(("height", "width"), [(47, 100), (100, 63)])
def test_upscaling_is_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"frames are {height}x{width}, expected at least 48x64"):
        center_crop_box(height, width, (48, 64))


def test_fit_crops_then_downscales() -> None:
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 90, 3), dtype=np.uint8))
    got = fit_frames(frames, (20, 30))
    assert got.shape == (3, 3, 20, 30)
    assert torch.equal(crop_frames(frames, (20, 30)), frames[:, :, 15:75])
    middle = frames[:, :, 15:75].permute(3, 0, 1, 2).unsqueeze(0) / 127.5 - 1
    torch.testing.assert_close(got, resize_video(middle, (20, 30))[0], atol=1e-6, rtol=0)


@given(
    frame=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    shares=st.tuples(*(st.floats(0, 1) for _ in range(6))),
    seed=st.integers(0, 2**31),
)
def test_a_window_is_that_of_the_whole(frame: tuple[int, int], shares: tuple[float, ...], seed: int) -> None:
    height, width = (1 + round(share * (n - 1)) for share, n in zip(shares, frame, strict=False))
    frames = torch.from_numpy(random_frames(seed, 2, *frame, 3))
    rows, columns = (
        (start := round(a * (n - 1)), start + 1 + round(b * (n - 1 - start)))
        for a, b, n in ((shares[2], shares[3], height), (shares[4], shares[5], width))
    )
    want = fit_frames(frames, (height, width))[:, :, slice(*rows), slice(*columns)]
    torch.testing.assert_close(fit_window(frames, (height, width), rows, columns), want, rtol=0, atol=1e-5)


def test_a_window_of_frames_that_are_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="frames are 4x8, expected at least 8x8"):
        fit_window(torch.zeros(1, 4, 8, 3, dtype=torch.uint8), (8, 8), (0, 2), (0, 2))
