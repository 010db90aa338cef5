"""Metrics of videos, each a torchmetrics.Metric."""

from luve_lightning.metrics.base import Unavailable, VideoMetric
from luve_lightning.metrics.feature_moments import FeatureExtractor, FeatureMoments, FeatureStatistics, GroupedMoments
from luve_lightning.metrics.fidelity import PsnrRgb, Ssim
from luve_lightning.metrics.frechet_patch import FIDPatch, FrechetPatchDistance
from luve_lightning.metrics.iqa import Dover, Maniqa, Musiq, Niqe
from luve_lightning.metrics.spectral_distance import HighFrequencyShare, SpectralDistance
from luve_lightning.metrics.vbench import (
    VBENCH_DIMENSIONS,
    Aesthetic,
    AestheticQuality,
    BackgroundConsistency,
    BackgroundConsistencyTiles,
    ImagingQuality,
    ImagingQualityTiles,
    SubjectConsistency,
    SubjectConsistencyTiles,
    TemporalFlickering,
    vbench_average,
)

__all__ = [
    "VBENCH_DIMENSIONS",
    "Aesthetic",
    "AestheticQuality",
    "BackgroundConsistency",
    "BackgroundConsistencyTiles",
    "Dover",
    "FIDPatch",
    "FeatureExtractor",
    "FeatureMoments",
    "FeatureStatistics",
    "FrechetPatchDistance",
    "GroupedMoments",
    "HighFrequencyShare",
    "ImagingQuality",
    "ImagingQualityTiles",
    "Maniqa",
    "Musiq",
    "Niqe",
    "PsnrRgb",
    "SpectralDistance",
    "Ssim",
    "SubjectConsistency",
    "SubjectConsistencyTiles",
    "TemporalFlickering",
    "Unavailable",
    "VideoMetric",
    "vbench_average",
]
