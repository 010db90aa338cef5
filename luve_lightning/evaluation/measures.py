"""The metrics of an evaluation: prepared, or set aside with the reason."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torchmetrics import Metric

from luve_lightning.data.hashes import FileHashes
from luve_lightning.evaluation.reference_statistics import prepare_reference
from luve_lightning.evaluation.result_cache import code_digest, describe_metric, digest_of
from luve_lightning.metrics.base import Unavailable, VideoMetric
from luve_lightning.metrics.frechet_patch import FrechetPatchDistance

# How frames come out of a file is part of every result.
_DECODING = "luve_lightning.data.clips"


@dataclass(eq=False)  # metrics compare into metrics
class Measure:
    """A metric that is ready.

    Attributes:
        name: its column.
        metric: a `VideoMetric` or a `FrechetPatchDistance`; None for what is computed of other columns.
        identity: digest of all that its values depend on besides the videos.
        higher_is_better: direction; None when neither is.
        resolution: the size at which frames are measured, in words.
        extractor: of the features, for a Fréchet distance.
    """

    name: str
    metric: VideoMetric | FrechetPatchDistance | None
    identity: str
    higher_is_better: bool | None
    resolution: str
    extractor: str | None = None

    @property
    def full_reference(self) -> bool:
        """Whether each video is compared with its original."""
        return isinstance(self.metric, VideoMetric) and self.metric.full_reference

    @property
    def frechet(self) -> FrechetPatchDistance | None:
        """The metric, if it is a distance between sets."""
        return self.metric if isinstance(self.metric, FrechetPatchDistance) else None

    @property
    def needs_originals_features(self) -> bool:
        """Whether the set that it is a distance to is that of the originals."""
        return self.frechet is not None and self.frechet.reference is None

    def seed(self, video: str) -> str | None:
        """What besides the contents decides the result of a video of this name."""
        frechet = self.frechet
        return video if frechet is not None and frechet.patches.placement != "grid" else None


@dataclass(frozen=True)
class Skipped:
    """A metric that cannot run here, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        """In a line; many reasons begin with the name."""
        return self.reason if self.reason.startswith(f"{self.name} ") else f"{self.name}: {self.reason}"


def prepare_measures(
    metrics: Mapping[str, Metric], device: torch.device, originals: bool, hashes: FileHashes, cache: Path
) -> tuple[list[Measure], list[Skipped]]:
    """Prepare every metric that can run, in the order given.

    Args:
        metrics: as configured, by the key in the configuration.
        device: where they run.
        originals: whether there are originals to compare with.
        hashes: for the files that the configuration names.
        cache: folder that keeps statistics of reference folders.

    Raises:
        FileNotFoundError: a reference that is named is not there.
        ValueError: a reference that does not fit, something that is no metric of videos, or two of one name.
    """
    ready: list[Measure] = []
    skipped: list[Skipped] = []
    keys: dict[str, str] = {}
    for key, metric in metrics.items():
        if not isinstance(metric, VideoMetric | FrechetPatchDistance):
            raise ValueError(f"metrics.{key}: {type(metric).__name__} is no metric of videos")
        name = metric.name
        if name in keys:
            raise ValueError(
                f"metrics.{keys[name]} and metrics.{key} are both {name}: switch one off with null"
            )
        keys[name] = key
        if isinstance(metric, VideoMetric) and metric.full_reference and not originals:
            skipped.append(Skipped(name, "compares with originals: give their folder, --reference DIR"))
            continue
        if isinstance(metric, FrechetPatchDistance) and metric.reference is None and not originals:
            skipped.append(
                Skipped(name, f"has no reference: give --reference DIR, or metrics.{key}.init_args.reference")
            )
            continue
        try:
            ready.append(_prepare(name, metric, device, hashes, cache))
        except Unavailable as reason:
            skipped.append(Skipped(name, " ".join(str(reason).split())))
    return ready, skipped


def _prepare(
    name: str,
    metric: VideoMetric | FrechetPatchDistance,
    device: torch.device,
    hashes: FileHashes,
    cache: Path,
) -> Measure:
    if isinstance(metric, FrechetPatchDistance):
        if isinstance(metric.reference, str | Path):
            prepare_reference(metric, metric.reference, device, cache)
        else:
            metric.prepare(device)
        identity: dict[str, Any] = {
            "class": type(metric).__qualname__,
            "code": [code_digest(type(part).__module__) for part in (metric, metric.extractor)],
            "patches": asdict(metric.patches),
            "extractor": metric.extractor.name,
        }
        extractor: str | None = metric.extractor.name
    else:
        identity = describe_metric(metric, hashes)  # before anything is loaded
        metric.prepare(device)
        identity |= {"weights": _weights_digest(metric)}
        extractor = None
    identity |= {"decoding": code_digest(_DECODING)}
    better = metric.higher_is_better
    return Measure(name, metric, digest_of(identity), better, metric.resolution, extractor)


def _weights_digest(metric: VideoMetric) -> str | None:
    """SHA-256 of the networks that were loaded: other weights at the same place give other values."""
    tensors = [*metric.named_parameters(), *metric.named_buffers()]
    if not tensors:
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
