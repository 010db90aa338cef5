"""Attentions that replace a transformer's own self-attention: their interface, and one a file beside it."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import entry_points
from typing import Any

from torch import Tensor

from luve_lightning.functional.frequency import Grid

GROUP = "luve_lightning.attention"
"""Entry points of packages that bring an attention: name = "package.module:Class"."""


class Attention(ABC):
    """Self-attention of a token grid without weights of its own.

    A subclass is a dataclass: its fields are its settings, plain JSON values. The transformer's `config.json`
    keeps them with the class's name, so a loaded transformer attends as in training.
    """

    @abstractmethod
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid) -> Tensor:
        """What each token gathers, shaped like the queries.

        Args:
            query: B x N x heads x width, after norms and positions.
            key: likewise.
            value: likewise.
            grid: tokens along T, h, w; N in all.
        """

    def record(self) -> dict[str, Any]:
        """Name and settings as JSON data."""
        settings: Any = self
        return {"name": type(self).__name__} | asdict(settings)

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Attention:
        """The attention that `record` describes.

        Raises:
            ValueError: for an unknown name or unknown settings.
        """
        settings = dict(record)
        name, known = settings.pop("name", None), {kind.__name__: kind for kind in _kinds()}
        if name not in known:
            raise ValueError(f"attention {name!r}: expected one of {', '.join(sorted(known)) or '(none is known)'}")
        try:
            return known[name](**settings)
        except TypeError as error:
            raise ValueError(f"attention {name}: {error}") from None


def _kinds() -> Iterator[Any]:
    """The known attentions: this folder's, those imported already and those of entry points; a file can add none."""
    for found in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{found.name}")
    for entry in entry_points(group=GROUP):
        entry.load()
    waiting: list[Any] = [*Attention.__subclasses__()]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        yield kind
