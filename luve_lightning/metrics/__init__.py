"""Metrics of videos, each a torchmetrics.Metric."""

from luve_lightning.metrics.base import Unavailable, VideoMetric
from luve_lightning.metrics.content import ContentCompleted, ContentKept, MotionMetric
from luve_lightning.metrics.detail_coherence import DetailCoherence
from luve_lightning.metrics.feature_moments import FeatureExtractor, FeatureMoments, FeatureStatistics, GroupedMoments
from luve_lightning.metrics.fidelity import HighFrequencyShare, OctaveDetail, PsnrRgb, SpectralDistance, Ssim
from luve_lightning.metrics.frame_networks import MotionRecognised, PhotographRecognised, SpriteRecognised
from luve_lightning.metrics.frechet_patch import DataCopying, FIDPatch, FrechetClipDistance, FrechetPatchDistance
from luve_lightning.metrics.iqa import Dover, Maniqa, Musiq, Niqe
from luve_lightning.metrics.repetition import Repetition
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
    "ContentCompleted",
    "ContentKept",
    "DataCopying",
    "DetailCoherence",
    "Dover",
    "FIDPatch",
    "FeatureExtractor",
    "FeatureMoments",
    "FeatureStatistics",
    "FrechetClipDistance",
    "FrechetPatchDistance",
    "GroupedMoments",
    "HighFrequencyShare",
    "ImagingQuality",
    "ImagingQualityTiles",
    "Maniqa",
    "MotionMetric",
    "MotionRecognised",
    "Musiq",
    "Niqe",
    "OctaveDetail",
    "PhotographRecognised",
    "PsnrRgb",
    "Repetition",
    "SpectralDistance",
    "SpriteRecognised",
    "Ssim",
    "SubjectConsistency",
    "SubjectConsistencyTiles",
    "TemporalFlickering",
    "Unavailable",
    "VideoMetric",
    "vbench_average",
]
