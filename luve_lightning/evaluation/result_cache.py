"""What was measured of a video, on disk: a killed run goes on, a second one measures only what is new."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from luve_lightning.datasets.safetensors_window import DIGEST, SafetensorsWindow, packed, tensor_digest
from luve_lightning.files import replacing, text_digest, warn_kept_in_memory, write_text

_FEATURES = "features"


@dataclass(frozen=True)
class Score:
    """One metric's value of one video.

    Attributes:
        value: in the metric's unit.
        weight: how much the video counts in a mean.
        versions: of the packages that measured it.
    """

    value: float
    weight: float
    versions: dict[str, str]


class ResultCache:
    """Scores and features by the contents of the files and the identity of the metric.

    A file is written under another name and renamed, so it is whole or not there; one that cannot be read, or whose
    sha256 is another, counts as missing. Several processes may share a folder: they write the same files. Where a
    folder may not be written, results are kept in memory, for this object.

    Args:
        folder: made on the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: dict[Path, Score | Tensor] = {}

    def score(self, key: str) -> Score | None:
        """A stored score, or None."""
        path = self._path(key, ".json")
        if isinstance(kept := self._kept.get(path), Score):
            return kept
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            score = Score(float(record["value"]), float(record["weight"]), dict(record["versions"]))
            return score if record.get(DIGEST) in (None, _digest(score)) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def put_score(self, key: str, score: Score, about: Mapping[str, str]) -> None:
        """Store a score with what it is of, for people who look into the folder."""
        path = self._path(key, ".json")
        try:
            write_text(path, json.dumps({**about, **asdict(score), DIGEST: _digest(score)}, indent=1) + "\n")
        except OSError as error:
            self._keep(path, score, error)

    def has_features(self, key: str) -> bool:
        """Whether features are stored, whole and as they were."""
        return self.features(key) is not None

    def features(self, key: str) -> Tensor | None:
        """Stored features, N x D float32, or None."""
        if isinstance(kept := self._kept.get(self._path(key, ".safetensors")), Tensor):
            return kept
        try:
            with self._open(key) as file:
                features = file.read(_FEATURES, (None, None))
                return features if file.metadata.get(DIGEST) == tensor_digest(features) else None
        except (OSError, ValueError):
            return None

    def put_features(self, key: str, features: Tensor) -> None:
        """Store features, N x D."""
        content = features.detach().to("cpu", torch.float32, copy=True)
        path = self._path(key, ".safetensors")
        try:
            with replacing(path) as temporary:
                temporary.write_bytes(packed(_FEATURES, content, {}))
        except OSError as error:
            self._keep(path, content, error)

    def _keep(self, path: Path, result: Score | Tensor, error: OSError) -> None:
        if not self._kept:
            warn_kept_in_memory(self.folder, error)
        self._kept[path] = result

    def _open(self, key: str) -> SafetensorsWindow:
        return SafetensorsWindow(self._path(key, ".safetensors"))

    def _path(self, key: str, suffix: str) -> Path:
        return self.folder / key[:2] / f"{key}{suffix}"


def _digest(score: Score) -> str:
    return text_digest(json.dumps(asdict(score), sort_keys=True))


def result_key(metric: str, video: str, original: str | None = None, seed: str | None = None) -> str:
    """The name of a result.

    Args:
        metric: digest of the metric's identity.
        video: SHA-256 of the file.
        original: SHA-256 of the file that it is compared with.
        seed: what else decides the result, such as the name that random patches are drawn for.
    """
    return text_digest(json.dumps([metric, video, original, seed]))[:40]
