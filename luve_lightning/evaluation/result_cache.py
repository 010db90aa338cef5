"""What was measured of a video, on disk: a killed run goes on, a second one measures only what is new."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from luve_lightning.evaluation.tables import write_text


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

    A file is written under another name and renamed, so it is whole or not there; one that cannot be read counts as
    missing. Several processes may share a folder: they write the same files.

    Args:
        folder: made on the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def score(self, key: str) -> Score | None:
        """A stored score, or None."""
        try:
            record = json.loads(self._path(key, ".json").read_text(encoding="utf-8"))
            return Score(float(record["value"]), float(record["weight"]), dict(record["versions"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put_score(self, key: str, score: Score, about: Mapping[str, str]) -> None:
        """Store a score with what it is of, for people who look into the folder."""
        write_text(self._path(key, ".json"), json.dumps({**about, **asdict(score)}, indent=1) + "\n")

    def has_features(self, key: str) -> bool:
        """Whether features are stored whole; reads none of them."""
        return self._open(key, "r") is not None

    def features(self, key: str) -> Tensor | None:
        """Stored features, N x D float32, or None."""
        content = self._open(key, None)
        return None if content is None else torch.from_numpy(content)

    def put_features(self, key: str, features: Tensor) -> None:
        """Store features, N x D."""
        content = io.BytesIO()
        np.save(content, features.detach().cpu().float().numpy(), allow_pickle=False)
        path = self._path(key, ".npy")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _open(self, key: str, mmap_mode: Literal["r"] | None) -> np.ndarray | None:
        try:
            found: np.ndarray = np.load(self._path(key, ".npy"), mmap_mode=mmap_mode, allow_pickle=False)
        except (OSError, ValueError, EOFError, TypeError):
            return None
        return found

    def _path(self, key: str, suffix: str) -> Path:
        return self.folder / key[:2] / f"{key}{suffix}"


def result_key(metric: str, video: str, original: str | None = None, seed: str | None = None) -> str:
    """The name of a result.

    Args:
        metric: digest of the metric's identity.
        video: SHA-256 of the file.
        original: SHA-256 of the file that it is compared with.
        seed: what else decides the result, such as the name that random patches are drawn for.
    """
    return hashlib.sha256(json.dumps([metric, video, original, seed]).encode()).hexdigest()[:40]
