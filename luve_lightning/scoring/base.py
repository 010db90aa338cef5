"""What every scorer of clips offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from luve_lightning.datasets.clip_types import Frames


class Scorer(ABC):
    """Rates pictures, one number each, more is better.

    Scores of different scorers, or of one scorer's versions, are never mixed or compared. Constructing one is cheap:
    a model is loaded when the first picture is scored.
    """

    name: str
    """Which measure it is."""

    @property
    @abstractmethod
    def version(self) -> str:
        """Everything besides the pictures and captions that decides the scores, such as a digest of the weights."""

    @abstractmethod
    def score(self, frames: Frames, captions: Sequence[str]) -> list[float]:
        """Rate frames against captions.

        Args:
            frames: uint8 N x H x W x 3, red first.
            captions: N texts, one for each frame.

        Returns:
            N finite numbers.
        """
