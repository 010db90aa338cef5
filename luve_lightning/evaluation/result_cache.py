"""What a metric's values depend on besides the video: its configuration, its networks and its code.

A metric does not know the text that configured it. Its attributes right after construction say the same, and more:
defaults, and what was given from outside.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from luve_lightning.data.hashes import FileHashes
from luve_lightning.files import replacing, text_digest, warn_kept_in_memory, write_text
from luve_lightning.safetensors_window import DIGEST, SafetensorsWindow, packed, tensor_digest

_PACKAGE = "luve_lightning"
# Values that share a digest are taken as equal; 16 hex digits of SHA-256 are enough for a folder of results.
_DIGITS = 16


class _Bare(Metric):
    """Shows the attributes that every metric has."""

    def update(self) -> None:
        """Nothing."""

    def compute(self) -> None:
        """Nothing."""


def describe_metric(metric: Metric, hashes: FileHashes) -> dict[str, Any]:
    """A metric's class, code and configuration; call it before `prepare` loads anything.

    Args:
        metric: newly constructed.
        hashes: digests of the files that the configuration names, so that another file at the same path is
            noticed.

    Returns:
        JSON data; equal for equal configurations, in any process.
    """
    known = vars(_Bare()).keys()
    held = {name: value for name, value in vars(metric).items() if name not in known}
    held |= {name: value for name, value in metric._modules.items() if value is not None}
    kind = type(metric)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "code": code_digest(kind.__module__),
        "configuration": _plain(held, hashes, frozenset()),
    }


def digest_of(description: Mapping[str, Any]) -> str:
    """A short name for a description."""
    text = json.dumps(description, sort_keys=True)
    return text_digest(text)[:_DIGITS]


@lru_cache(maxsize=256)
def code_digest(module: str) -> str:
    """SHA-256 of a module's source and of everything of this package that it imports, directly or not."""
    found: dict[str, bytes] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        file = _source(name)
        if name in found or file is None:
            continue
        found[name] = file.read_bytes()
        todo += _imported(found[name])
    digest = hashlib.sha256()
    for name, source in sorted(found.items()):
        digest.update(name.encode() + b"\0" + source + b"\0")
    return digest.hexdigest()[:_DIGITS]


def _source(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # `from package import name`: the name is no module
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _imported(source: bytes) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] == _PACKAGE)


def _plain(value: Any, hashes: FileHashes, inside: frozenset[int]) -> Any:
    """A value as JSON data."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return {"path": str(value), "sha256": hashes.digest(value) if value.is_file() else None}
    if isinstance(value, enum.Enum):
        return str(value)
    if isinstance(value, torch.Tensor):
        return _array(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), value)
    if isinstance(value, np.ndarray | np.generic):
        return _array(np.ascontiguousarray(value), value)
    if isinstance(value, torch.dtype | torch.device | type) or (callable(value) and not _has_state(value)):
        return getattr(value, "__qualname__", str(value))
    if id(value) in inside:
        return "itself"
    inside |= {id(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, hashes, inside) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, hashes, inside) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item, hashes, inside) for item in value), key=repr)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return {"class": kind, "code": code_digest(type(value).__module__)} | _state(value, hashes, inside)


def _has_state(value: Any) -> bool:
    return isinstance(value, nn.Module) or dataclasses.is_dataclass(value) or bool(getattr(value, "__dict__", None))


def _array(content: np.ndarray | np.generic, value: Any) -> dict[str, Any]:
    shape, kind = list(value.shape), str(value.dtype)
    return {"shape": shape, "dtype": kind, "sha256": hashlib.sha256(content.tobytes()).hexdigest()[:_DIGITS]}


def _state(value: Any, hashes: FileHashes, inside: frozenset[int]) -> dict[str, Any]:
    if isinstance(value, nn.Module):
        known = vars(nn.Module()).keys()
        held = {name: item for name, item in vars(value).items() if name not in known}
        held |= dict(value._modules) | dict(value._buffers) | dict(value._parameters)
    elif dataclasses.is_dataclass(value):
        held = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        held = dict(getattr(value, "__dict__", {}))
    return {name: _plain(item, hashes, inside) for name, item in held.items()}


_FEATURES = "features"


@dataclass(frozen=True)
class Score:
    """One metric's value of one video.

    Attributes:
        value: in the metric's unit.
        weight: the video's weight in a mean.
        versions: versions of the packages that measured it.
    """

    value: float
    weight: float
    versions: dict[str, str]


class ResultCache:
    """Scores and features, stored by the contents of the files and the identity of the metric.

    A file is written under another name and renamed, so it is complete or absent; one that is unreadable, or has
    another sha256, counts as missing. Several processes may share a folder: they write the same files. Where a
    folder may not be written, results are kept in memory, for this object.

    Args:
        folder: created by the first write.
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
        """Store a score with its description, for people who look into the folder."""
        path = self._path(key, ".json")
        try:
            write_text(path, json.dumps({**about, **asdict(score), DIGEST: _digest(score)}, indent=1) + "\n")
        except OSError as error:
            self._keep(path, score, error)

    def features(self, key: str) -> Tensor | None:
        """Stored features, N x D float32; None where there are none, or damaged ones."""
        if isinstance(kept := self._kept.get(self._path(key, ".safetensors")), Tensor):
            return kept
        try:
            with SafetensorsWindow(self._path(key, ".safetensors")) as file:
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

    def _path(self, key: str, suffix: str) -> Path:
        return self.folder / key[:2] / f"{key}{suffix}"


def _digest(score: Score) -> str:
    return text_digest(json.dumps(asdict(score), sort_keys=True))


def result_key(metric: str, video: str, original: str | None = None, seed: str | None = None) -> str:
    """The name of a result.

    Args:
        metric: digest of the metric's identity.
        video: SHA-256 of the file.
        original: SHA-256 of its original, if it is compared with one.
        seed: what else decides the result: the name that random patches are drawn for, or the prompt.
    """
    return text_digest(json.dumps([metric, video, original, seed]))[:40]
