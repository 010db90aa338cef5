"""What a metric's values depend on besides the video: its configuration, its networks and its code.

A metric does not know the text that configured it. What it holds right after its construction says the same, and
more: defaults, and what was given from outside.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchmetrics import Metric

from luve_lightning.datasets.file_hashes import FileHashes
from luve_lightning.files import text_digest

_PACKAGE = "luve_lightning"
# Two values that share a digest are the same value; 16 hex digits of SHA-256 are enough for a folder of results.
_DIGITS = 16


class _Bare(Metric):
    """Tells what every metric holds."""

    def update(self) -> None:
        """Nothing."""

    def compute(self) -> None:
        """Nothing."""


def describe_metric(metric: Metric, hashes: FileHashes) -> dict[str, Any]:
    """A metric's class, code and configuration; call it before `prepare` loads anything.

    Args:
        metric: as constructed.
        hashes: digests of the files that the configuration names, so that another file at the same path is noticed.

    Returns:
        What JSON can hold; equal for equal configurations, in any process.
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
    """SHA-256 of a module's source and of all of this package that it imports, directly or not."""
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
    """A value as JSON can hold it."""
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
    return (
        isinstance(value, nn.Module)
        or dataclasses.is_dataclass(value)
        or bool(getattr(value, "__dict__", None))
    )


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
