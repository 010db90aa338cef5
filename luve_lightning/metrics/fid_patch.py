"""FID_patch, as LuVe measures it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luve_lightning.functional.patches import PatchPlan
from luve_lightning.metrics.feature_statistics import FeatureStatistics
from luve_lightning.metrics.frechet_patch import FrechetPatchDistance
from luve_lightning.metrics.inception_features import InceptionFeatures

PAPER_PATCHES = PatchPlan()


class FIDPatch(FrechetPatchDistance):
    """FID of patches (LuVe, arXiv 2602.11564, Tables 5 and 6): lower is better.

    8 frames of each of 250 videos, 256x256 patches, clean-fid's resize and Inception; the paper's reference is
    UltraHR-eval4k's still images. The paper does not say how many patches of a frame, or where: here a grid covers
    the frame (`PatchPlan`). See `FrechetPatchDistance` for what can be compared.

    Args:
        patches: which patches of which frames.
        weights: Inception's file or its folder; None for the usual places (`WeightFile.find`).
        reference: see `FrechetPatchDistance`.
        batch_size: see `FrechetPatchDistance`.
    """

    def __init__(
        self,
        patches: PatchPlan = PAPER_PATCHES,
        weights: str | Path | None = None,
        reference: FeatureStatistics | Path | str | None = None,
        batch_size: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(patches, InceptionFeatures(weights), reference, batch_size, **kwargs)
