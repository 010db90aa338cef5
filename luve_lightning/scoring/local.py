"""A cheap scorer for small worlds: how sharp and how well exposed a frame is. It knows nothing of taste or captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from luve_lightning.datasets.clip_types import Frames
from luve_lightning.scoring.base import Scorer

_MARGIN = 0.02  # luminance this near to black or white shows nothing: five of 256 levels


class SharpnessExposure(Scorer):
    """Sharpness times exposure, in [0, 1]. Captions are not looked at; this is no stand-in for HPS v3.

    Sharpness is 1 - `skimage.measure.blur_effect` (Crete et al. 2007: how little a blur changes the frame), exposure
    the share of pixels that are neither black nor white.
    """

    name = "sharpness-exposure"

    @property
    def version(self) -> str:
        """Of the formula above; the photographs' library is pinned by minor version."""
        return "1"

    def score(self, frames: Frames, captions: Sequence[str]) -> list[float]:
        """N x H x W x 3 uint8 to N numbers in [0, 1]; frames are at least 2 pixels high and wide."""
        from skimage.color import rgb2gray

        return [_sharpness(gray) * _exposure(gray) for gray in map(rgb2gray, frames)]


def _sharpness(gray: NDArray[np.float64]) -> float:
    from skimage.measure import blur_effect

    if gray.std() < 1e-6:  # nothing to see; blur_effect would divide nothing by nothing
        return 0.0
    return float(np.clip(1 - blur_effect(gray), 0, 1))


def _exposure(gray: NDArray[np.float64]) -> float:
    return float(np.mean((gray > _MARGIN) & (gray < 1 - _MARGIN)))
