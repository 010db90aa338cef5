"""The local scorer: sharper and better exposed is more, whatever the caption."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from skimage.data import astronaut
from skimage.filters import gaussian
from skimage.measure import blur_effect

from luve_lightning.data.clip_container import Frames
from luve_lightning.data.scorers import HPSv3Scorer, SharpnessExposure, TakeQuality
from luve_lightning.functional.takes import take_quality

PHOTOGRAPH: Frames = astronaut()[:200, :240]


def changed(sigma: float = 0, gain: float = 1, offset: float = 0) -> Frames:
    picture = gaussian(PHOTOGRAPH, sigma, channel_axis=2) if sigma else PHOTOGRAPH / 255
    return np.asarray(np.clip(picture * gain + offset, 0, 1) * 255).round().astype(np.uint8)


def scores(*pictures: Frames) -> list[float]:
    return SharpnessExposure().score(np.stack(pictures), ["a caption"] * len(pictures))


def test_it_falls_with_blur() -> None:
    values = scores(*(changed(sigma) for sigma in (0, 1, 2, 4)))
    assert values == sorted(values, reverse=True)
    assert values[0] > 2 * values[-1]


def test_it_falls_where_pixels_are_lost_in_black_or_white() -> None:
    plain, dark, bright = scores(changed(), changed(offset=-0.5), changed(offset=0.5))
    assert max(dark, bright) < plain


def test_it_is_the_product_that_the_docstring_says() -> None:
    gray = PHOTOGRAPH @ np.array([0.2125, 0.7154, 0.0721]) / 255
    exposed = np.count_nonzero((gray > 0.02) & (gray < 0.98)) / gray.size
    assert scores(PHOTOGRAPH)[0] == pytest.approx((1 - blur_effect(gray)) * exposed)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_flat_frame_is_worth_nothing(level: int) -> None:
    assert scores(np.full((20, 30, 3), level, np.uint8)) == [0]


def test_each_frame_stands_for_itself() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (4, 9, 11, 3), dtype=np.uint8)
    together = SharpnessExposure().score(pictures, ["x"] * 4)
    assert together == [SharpnessExposure().score(picture[None], ["y"])[0] for picture in pictures]
    assert all(0 <= value <= 1 for value in together)


def test_a_take_is_rated_as_a_whole() -> None:
    pictures = np.stack([np.roll(PHOTOGRAPH, 3 * step, axis=1) for step in range(5)])
    values = TakeQuality().score(pictures, ["x"] * 5)
    assert values == [take_quality(torch.from_numpy(pictures))] * 5
    assert values[0] > 0.5
    still = np.stack([PHOTOGRAPH] * 5)
    assert TakeQuality().score(still, ["y"] * 5)[0] < 0.01


@pytest.mark.skipif(find_spec("hpsv3") is not None, reason="it is installed")
def test_without_the_package_it_says_how_to_get_it() -> None:
    with pytest.raises(ValueError, match=r"not installed in this environment; run `make setup-hpsv3`"):
        HPSv3Scorer()
