"""PSNR and SSIM of frames are those of the clips they show."""

from __future__ import annotations

import math

import pytest
import torch
from skimage.metrics import structural_similarity

from luve_lightning.functional.fidelity import psnr
from luve_lightning.functional.pixels import frames_to_video
from luve_lightning.metrics import PsnrRgb, Ssim, fidelity
from tests.helpers.video_metrics import random_video


@pytest.fixture(params=[None, 40 * 60 * 3 * 2], ids=["at once", "two frames at a time"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(fidelity, "_CHUNK_VALUES", request.param)


def test_psnr_by_hand() -> None:
    original = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    video = original.clone()
    video[0] += 10  # a mean squared error of 50 over the clip
    assert PsnrRgb().score(video, original) == pytest.approx(10 * math.log10(255**2 / 50), abs=1e-9)
    assert PsnrRgb().score(video, video) == math.inf


@pytest.mark.usefixtures("_chunks")
def test_psnr_of_the_same_clips_as_tensors() -> None:
    video, original = random_video(5, seed=1), random_video(5, seed=2)
    expected = psnr(frames_to_video(video)[None], frames_to_video(original)[None]).item()
    assert PsnrRgb().score(video, original) == pytest.approx(expected, abs=1e-4)


@pytest.mark.usefixtures("_chunks")
def test_ssim_of_another_implementation() -> None:
    original = random_video(5, seed=1)
    video = (
        original.float().lerp(random_video(5, seed=2).float(), torch.linspace(0.1, 0.5, 5)[:, None, None, None]).byte()
    )
    expected = [
        structural_similarity(
            a,
            b,
            data_range=255,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )[1][5:-5, 5:-5].mean()
        for a, b in zip(video.numpy(), original.numpy(), strict=True)
    ]
    assert Ssim().score(video, original) == pytest.approx(sum(expected) / 5, abs=1e-4)
    assert Ssim().score(video, video) == pytest.approx(1, abs=1e-6)
