"""Metrics of videos made by several processes, equal to those of one process."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchmetrics import Metric

from luve_lightning.evaluation.sample_sources import SampleVideo
from luve_lightning.functional.patches import frechet_distance
from luve_lightning.metrics.base import Unavailable, VideoMetric
from luve_lightning.metrics.feature_moments import FeatureMoments
from luve_lightning.metrics.frechet_patch import FrechetPatchDistance


@dataclass(frozen=True)
class Measured:
    """What one video adds to the metrics; small enough to send to another process.

    Attributes:
        scores: weight in the mean and score, by metric.
        features: features of the video's patches, N x D, by metric.
    """

    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)


class SampleMeter:
    """Measures single videos, and combines the results.

    The metrics' own states are not used: each video's contribution is gathered and added in the videos' order, so
    any number of processes gives the numbers of one, to the last bit.

    Args:
        metrics: VideoMetrics and FrechetPatchDistances by name; None is a disabled one.
        has_reference: whether the videos come with originals.

    Raises:
        ValueError: another kind of metric, one that needs prompts, or originals where there are none.
    """

    def __init__(self, metrics: Mapping[str, Metric | None], has_reference: bool) -> None:
        self.videos: dict[str, VideoMetric] = {}
        self.distances: dict[str, FrechetPatchDistance] = {}
        for name, metric in metrics.items():
            if isinstance(metric, FrechetPatchDistance):
                self.distances[name] = metric
            elif isinstance(metric, VideoMetric):
                if metric.full_reference and not has_reference:
                    raise ValueError(f"metrics: {name} compares with an original, and generated videos have none")
                if metric.prompted:
                    raise ValueError(f"metrics: {name} needs each video's prompt: measure it with luve evaluate")
                self.videos[name] = metric
            elif metric is not None:
                raise ValueError(
                    f"metrics: {name}: expected a VideoMetric or FrechetPatchDistance, got {type(metric).__name__}"
                )

    @property
    def names(self) -> list[str]:
        """Names of the measured metrics."""
        return [*self.distances, *self.videos]

    def prepare(self, device: torch.device) -> dict[str, str]:
        """Load what the metrics need; returns, by name, why one cannot be measured here, in one line."""
        missing = {}
        for name, metric in (self.distances | self.videos).items():
            try:
                metric.prepare(device)
            except Unavailable as error:
                missing[name] = str(error)
        return missing

    def leave_out(self, name: str) -> None:
        """Stop measuring this metric."""
        self.distances.pop(name, None)
        self.videos.pop(name, None)

    def measure(self, video: SampleVideo, name: str) -> Measured:
        """The video's contribution; `name` decides where random patches lie."""
        scores = {
            metric: (one.weight(video.frames), one.score(video.frames, video.reference))
            for metric, one in self.videos.items()
        }
        features = {metric: one.features(video.frames, name) for metric, one in self.distances.items()}
        return Measured(scores, features)

    def without_reference(self) -> list[str]:
        """Fréchet distances without reference statistics: real videos stand in."""
        return [name for name, metric in self.distances.items() if metric.reference is None]

    def features(self, frames: Tensor, name: str) -> Measured:
        """Features of one real video, for the distances without a reference."""
        return Measured(
            features={metric: self.distances[metric].features(frames, name) for metric in self.without_reference()}
        )


class SampleTotals:
    """The sum of single videos' contributions."""

    def __init__(self) -> None:
        self.count = 0
        self.scores: dict[str, list[tuple[float, float]]] = {}
        self.moments: dict[str, FeatureMoments] = {}

    def add(self, measured: Measured) -> None:
        """Add one video; the order decides the last bits."""
        self.count += 1
        for name, score in measured.scores.items():
            self.scores.setdefault(name, []).append(score)
        for name, features in measured.features.items():
            moments = FeatureMoments.from_features(features)
            self.moments[name] = self.moments[name] + moments if name in self.moments else moments

    def results(self, meter: SampleMeter, real: SampleTotals) -> dict[str, float]:
        """The metrics' values, in the order of `meter.names`.

        Args:
            meter: measured the videos.
            real: totals of real videos, for the distances without a reference.
        """
        values = {}
        for name, metric in meter.distances.items():
            made = self.moments[name]
            if name in real.moments:
                truth = real.moments[name]
                values[name] = frechet_distance(truth.mean(), truth.cov(), made.mean(), made.cov())
            else:
                values[name] = metric.distance(made)
        for name in meter.videos:
            weights = math.fsum(weight for weight, _ in self.scores[name])
            values[name] = math.fsum(weight * score for weight, score in self.scores[name]) / weights
        return values
