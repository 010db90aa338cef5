"""Measures of videos, one torchmetrics.Metric a file."""

from luve_lightning.metrics.aesthetic import Aesthetic
from luve_lightning.metrics.aesthetic_quality import AestheticQuality
from luve_lightning.metrics.background_consistency import BackgroundConsistency, BackgroundConsistencyTiles
from luve_lightning.metrics.base import Unavailable, VideoMetric
from luve_lightning.metrics.feature_moments import (
    FeatureExtractor,
    FeatureMoments,
    FeatureStatistics,
    GroupedMoments,
)
from luve_lightning.metrics.fidelity import PsnrRgb, Ssim
from luve_lightning.metrics.frechet_patch import FIDPatch, FrechetPatchDistance
from luve_lightning.metrics.imaging_quality import ImagingQuality, ImagingQualityTiles
from luve_lightning.metrics.iqa import Dover, Maniqa, Musiq, Niqe
from luve_lightning.metrics.spectral_distance import HighFrequencyShare, SpectralDistance
from luve_lightning.metrics.subject_consistency import SubjectConsistency, SubjectConsistencyTiles
from luve_lightning.metrics.temporal_flickering import TemporalFlickering
from luve_lightning.metrics.vbench_average import VBENCH_DIMENSIONS, vbench_average

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
