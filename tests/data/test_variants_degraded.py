"""Degraded clips: blurred, coarser and noisy by amounts of their own, the same every time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from luve_lightning.data.variants import Degraded


def clip(batch: int = 1, side: int = 24) -> torch.Tensor:
    return torch.rand(batch, 3, 2, side, side + 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_each_part_is_what_it_says() -> None:
    """A Gaussian alone, as SciPy blurs; noise alone, by its deviation; a reduction alone, by what it leaves."""
    nothing: dict[str, Any] = {"blur": (1e-3, 1e-3), "shrink": (1.0, 1.0), "noise": (0.0, 0.0)}
    video = clip()
    torch.testing.assert_close(Degraded(**nothing)(video), video)
    blurred = Degraded(**nothing | {"blur": (1.5, 1.5)})(video)
    want = gaussian_filter(video.numpy(), (0, 0, 0, 1.5, 1.5), mode="reflect")
    np.testing.assert_allclose(blurred.numpy(), want, atol=1e-5)
    still = torch.zeros(1, 3, 4, 64, 64)
    assert Degraded(**nothing | {"noise": (0.1, 0.1)})(still).std().item() == pytest.approx(0.1, rel=0.02)
    coarse = Degraded(**nothing | {"shrink": (2.0, 2.0)})(video)
    assert coarse.shape == video.shape
    spectra = [torch.fft.rfft2(x).abs()[..., 8:16, 10:].mean() for x in (coarse, video)]
    assert spectra[0] < 0.2 * spectra[1], "of the frequencies that half the size cannot show, little is left"


def test_a_clip_gives_the_same_in_any_company_and_another_seed_another() -> None:
    videos, one = clip(3), Degraded()
    together = one(videos)
    assert torch.equal(torch.cat([one(each) for each in videos.split(1)]), together)
    assert not torch.equal(Degraded(seed=1)(videos), together)
    assert together.abs().max() <= 1
    assert one.label() == "seed 0, blur 0.2 to 2.0, shrink 1.0 to 2.0, noise 0.0 to 0.05"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"blur": (0, 1)}, r"blur: expected 0 < least <= greatest, got \[0, 1\]"),
        ({"shrink": (0.5, 1)}, r"shrink: expected 1 <= least <= greatest, got \[0.5, 1\]"),
        ({"noise": (0.2, 0.1)}, r"noise: expected 0 <= least <= greatest, got \[0.2, 0.1\]"),
    ],
)
def test_ranges_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Degraded(**options)
