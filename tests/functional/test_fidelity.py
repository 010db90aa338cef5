"""PSNR, SSIM and the frame-difference error, against plain implementations and scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity

from luve_lightning.functional import fidelity
from luve_lightning.functional.fidelity import frame_difference_error, psnr, ssim


def pair(batch: int, frames: int, height: int, width: int, noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch + frames + height + width)
    target = torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1
    return (target + noise * torch.randn(target.shape, generator=generator)).clamp(-1, 1), target


shapes = {
    "batch": st.integers(1, 3),
    "frames": st.integers(1, 4),
    "height": st.integers(11, 20),
    "width": st.integers(11, 24),
}


@settings(max_examples=25, deadline=None)
@given(**shapes)
def test_psnr_is_the_definition(batch: int, frames: int, height: int, width: int) -> None:
    video, target = pair(batch, frames, height, width)
    got = psnr(video, target)
    assert got.shape == (batch,)
    for i in range(batch):
        mse = np.mean((video[i].double().numpy() - target[i].double().numpy()) ** 2)
        assert got[i].item() == pytest.approx(10 * math.log10(4 / mse), abs=1e-4)


def test_psnr_of_the_same_clip_and_of_a_known_error() -> None:
    video, target = torch.zeros(1, 3, 2, 4, 4), torch.full((1, 3, 2, 4, 4), 0.2)
    assert psnr(target, target).item() == math.inf
    assert psnr(video, target).item() == pytest.approx(20.0, abs=1e-5)
    assert psnr(video, target, data_range=1.0).item() == pytest.approx(20 - 20 * math.log10(2), abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(**shapes)
def test_ssim_is_scikit_images(batch: int, frames: int, height: int, width: int) -> None:
    video, target = pair(batch, frames, height, width)
    got = ssim(video, target)
    assert got.shape == (batch,)
    for i in range(batch):
        maps = []
        for x, y in zip(video[i].flatten(0, 1).numpy(), target[i].flatten(0, 1).numpy(), strict=True):
            _, full = structural_similarity(
                (x.astype(np.float64) + 1) / 2,  # black is 0, as on disk
                (y.astype(np.float64) + 1) / 2,
                data_range=1.0,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                full=True,
            )
            maps.append(full[5:-5, 5:-5])  # scikit-image pads; the paper's windows lie inside
        assert got[i].item() == pytest.approx(np.mean(maps), abs=1e-5)


def test_ssim_in_parts_is_ssim_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    video, target = pair(2, 5, 16, 13)
    whole = ssim(video, target)
    monkeypatch.setattr(fidelity, "_SSIM_VALUES", 2 * video[:, :, :1].numel())
    torch.testing.assert_close(ssim(video, target), whole, rtol=1e-6, atol=1e-6)
    assert ssim(target, target).tolist() == pytest.approx([1.0, 1.0])


def test_ssim_does_not_see_one_clip_in_another() -> None:
    video, target = pair(3, 2, 12, 12)
    alone = torch.cat([ssim(v, t) for v, t in zip(video.split(1), target.split(1), strict=True)])
    torch.testing.assert_close(ssim(video, target), alone)


@settings(max_examples=25, deadline=None)
@given(**shapes)
def test_frame_difference_error_is_the_definition(batch: int, frames: int, height: int, width: int) -> None:
    video, target = pair(batch, frames, height, width)
    got = frame_difference_error(video, target)
    x, y = video.double().numpy(), target.double().numpy()
    for i in range(batch):
        steps = [np.abs((x[i, :, t] - x[i, :, t - 1]) - (y[i, :, t] - y[i, :, t - 1])).mean() for t in range(1, frames)]
        assert got[i].item() == pytest.approx(np.mean(steps) if steps else 0.0, abs=1e-6)


def test_a_constant_error_is_no_error_of_motion() -> None:
    _, target = pair(1, 4, 12, 12)
    assert frame_difference_error(target + 0.25, target).item() == pytest.approx(0, abs=1e-6)
    assert psnr(target + 0.25, target).item() < 20


def test_wrong_pairs_are_refused() -> None:
    video, target = pair(1, 2, 12, 12)
    for measure in (psnr, ssim, frame_difference_error):
        with pytest.raises(ValueError, match="two B x C x T x H x W videos of one shape"):
            measure(video, target[:, :, :1])
        with pytest.raises(ValueError, match="two B x C x T x H x W videos of one shape"):
            measure(video[0], target[0])
    with pytest.raises(ValueError, match="smaller than the 11-tap"):
        ssim(video[..., :10], target[..., :10])
