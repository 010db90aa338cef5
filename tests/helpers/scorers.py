"""Scorers for tests. Imports little: each process of a test imports it anew."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from luve_lightning.data.clip_container import Frames
from luve_lightning.data.scorers import Scorer


class Recording(Scorer):
    """The mean of red, and one line a call in a file: the captions.

    Args:
        log: the file; None writes nothing.
        revision: `version`.
        hold: calls wait while this file exists.
    """

    name = "recording"

    def __init__(self, log: Path | None = None, revision: str = "1", hold: Path | None = None) -> None:
        self.log, self.revision, self.hold = log, revision, hold

    @property
    def version(self) -> str:
        return self.revision

    def score(self, frames: Frames, captions: Sequence[str]) -> list[float]:
        if self.log is not None:
            with self.log.open("a") as stream:
                stream.write(" ".join(captions) + "\n")
        while self.hold is not None and self.hold.exists():
            time.sleep(0.01)
        return [float(frame[..., 0].mean()) for frame in frames]


class NotANumber(Recording):
    """A scorer with a bug."""

    def score(self, frames: Frames, captions: Sequence[str]) -> list[float]:
        return [float("nan")] * len(captions)
