"""Unsharp masking beside scikit-image's, frame by frame and channel by channel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.filters import unsharp_mask as skimage_unsharp_mask
from torch import Tensor

from luve_lightning.functional import unsharp
from luve_lightning.functional.unsharp import unsharp_mask

LEVEL = 1 / 255


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def reference(video: Tensor, radius: float, amount: float) -> Tensor:
    """scikit-image on each channel of each frame, scaled to [0, 1], in float64.

    One channel at a time: with `channel_axis=-1` scikit-image 0.26 filters three rows and leaves the rest unset
    (its issue 7264).
    """
    planes = (video.double().flatten(0, 2).numpy() + 1) / 2
    sharp = [skimage_unsharp_mask(plane, radius=radius, amount=amount) for plane in planes]
    return torch.from_numpy(np.stack(sharp)).reshape(video.shape)


def levels_apart(video: Tensor, radius: float, amount: float) -> float:
    """Largest difference to scikit-image, in levels of 8 bits."""
    got = (unsharp_mask(video, radius, amount).double() + 1) / 2
    return float((got - reference(video, radius, amount)).abs().max()) / LEVEL


@settings(max_examples=60, deadline=None)
@given(
    radius=st.floats(0.3, 6),
    amount=st.floats(-1, 4),
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    seed=st.integers(0, 99),
)
def test_it_is_scikit_images(radius: float, amount: float, height: int, width: int, seed: int) -> None:
    """Also where a side is shorter than the kernel (up to 49 pixels), down to one pixel."""
    assert levels_apart(noise(1, 2, 1, height, width, seed=seed), radius, amount) < 0.01


@pytest.mark.parametrize(("height", "width"), [(64, 128), (65, 127), (63, 193), (7, 300), (300, 7), (1, 1)])
@pytest.mark.parametrize("radius", [0.3, 1.0, 6.0])
def test_sides_at_and_around_the_block_size(radius: float, height: int, width: int) -> None:
    assert levels_apart(noise(2, 3, 2, height, width), radius, 1.0) < 0.01


def test_the_comparison_would_notice_other_edges_and_kernels() -> None:
    video = noise(1, 1, 1, 40, 40)
    assert (reference(video, 2.0, 1.0) - reference(video, 2.1, 1.0)).abs().max() > LEVEL
    padded = torch.nn.functional.pad(video[:, 0], (8, 8, 8, 8), mode="replicate")[:, None]
    inside = reference(padded, 2.0, 1.0)[..., 8:-8, 8:-8]
    assert (inside - reference(video, 2.0, 1.0)).abs().max() > LEVEL


def test_it_sharpens_and_stays_in_range() -> None:
    step = torch.full((1, 1, 1, 32, 32), -0.5)
    step[..., 16:] = 0.5
    sharp = unsharp_mask(step, 1.0, 1.0)
    assert sharp[0, 0, 0, 5, 15] < -0.6
    assert sharp[0, 0, 0, 5, 16] > 0.6
    torch.testing.assert_close(sharp[..., :8], step[..., :8], atol=1e-6, rtol=0)
    assert unsharp_mask(noise(1, 3, 2, 40, 40), 2.0, 20.0).abs().max() == 1


def test_the_input_is_left_alone_and_views_are_taken() -> None:
    video = noise(2, 4, 3, 50, 30)
    before = video.clone()
    view = video.permute(0, 2, 1, 4, 3)[:, :, 1:]
    assert torch.equal(unsharp_mask(view, 1.5, 1.0), unsharp_mask(view.contiguous(), 1.5, 1.0))
    assert torch.equal(video, before)
    assert not unsharp_mask(video.requires_grad_(), 1.5, 1.0).requires_grad
    assert unsharp_mask(video[:0], 1.5, 1.0).shape == (0, 4, 3, 50, 30)


def test_a_clip_does_not_depend_on_its_batch() -> None:
    video = noise(3, 3, 2, 70, 90)
    whole = unsharp_mask(video, 1.5, 1.0)
    for clip, expected in zip(video, whole, strict=True):
        assert torch.equal(unsharp_mask(clip.unsqueeze(0), 1.5, 1.0)[0], expected)


@pytest.mark.parametrize("at_once", [1, 100 * 90, 3 * 200 * 90])
def test_bands_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """A band of one block, of a part of a frame, and three of the eight planes at a time."""
    video = noise(1, 4, 2, 200, 90)
    whole = unsharp_mask(video, 3.0, 1.0)
    monkeypatch.setattr(unsharp, "_CPU_VALUES", at_once)
    torch.testing.assert_close(unsharp_mask(video, 3.0, 1.0), whole, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_memory_beside_the_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two buffers and the chunk in float32, however many frames there are."""
    monkeypatch.setattr(unsharp, "_CPU_VALUES", 2 * 128 * 128)

    def beside(frames: int) -> int:
        video = noise(1, 3, frames, 128, 128).bfloat16()
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
            unsharp_mask(video, 1.0, 1.0)
        now = most = 0
        for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            now += event.nbytes() if event.name() == "[memory]" else 0
            most = max(most, now)
        return most - video.nbytes

    assert 0 < beside(20) < 5 * 2 * 128 * 128 * 4
    assert beside(40) == beside(20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept_and_the_filter_runs_in_float32(dtype: torch.dtype) -> None:
    video = noise(1, 3, 2, 40, 50).to(dtype)
    got = unsharp_mask(video, 1.5, 1.0)
    assert got.dtype == dtype
    assert torch.equal(got, unsharp_mask(video.float(), 1.5, 1.0).to(dtype))


def test_autocast_changes_nothing() -> None:
    video = noise(1, 3, 2, 40, 50)
    plain = unsharp_mask(video, 1.5, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(unsharp_mask(video, 1.5, 1.0), plain)


@pytest.mark.parametrize(
    ("video", "radius", "amount", "message"),
    [
        (torch.zeros(3, 2, 8, 8), 1.0, 1.0, "expected floating point B x C x T x H x W, got float32 (3, 2, 8, 8)"),
        (torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8), 1.0, 1.0, "got uint8"),
        (torch.zeros(1, 3, 2, 8, 8), 0.0, 1.0, "radius: expected the Gaussian's sigma in pixels, > 0"),
        (torch.zeros(1, 3, 2, 8, 8), float("nan"), 1.0, "radius: "),
        (torch.zeros(1, 3, 2, 8, 8), 1.0, float("inf"), "amount: expected a finite number, got inf"),
    ],
)
def test_refusals(video: Tensor, radius: float, amount: float, message: str) -> None:
    with pytest.raises(ValueError) as error:
        unsharp_mask(video, radius, amount)
    assert message in str(error.value)
