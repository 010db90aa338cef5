"""Reading the frames of clips that are scored, ahead of the scorer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from luve_lightning.datasets.clips import ClipError, Frames, read_clip
from luve_lightning.datasets.file_hashes import Stamp, stamp
from luve_lightning.datasets.score_table import ScoreRow
from luve_lightning.datasets.video_index import ClipEntry


@dataclass(frozen=True)
class FrameChoice:
    """Which frames of a clip are scored.

    Attributes:
        count: so many, the middles of as many equal parts of the clip. A clip of fewer frames gives all of them.
        indices: these, counted from 0, instead.
    """

    count: int = 4
    indices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"frames: expected at least 1, got {self.count}")
        if self.indices is not None and (not self.indices or min(self.indices) < 0):
            raise ValueError(f"indices: expected one or more frame numbers >= 0, got {list(self.indices)}")

    def __str__(self) -> str:
        if self.indices is None:
            return f"{self.count} frames equally spaced"
        return f"frames {', '.join(map(str, self.indices))}"

    def of(self, total_frames: int) -> tuple[int, ...]:
        """The frame numbers for a clip of so many frames."""
        if self.indices is not None:
            return self.indices
        return tuple(dict.fromkeys((2 * i + 1) * total_frames // (2 * self.count) for i in range(self.count)))


@dataclass(frozen=True)
class ClipJob:
    """A clip to score: its row so far, and the stamp that its file had when it was hashed."""

    entry: ClipEntry
    row: ScoreRow
    seen: Stamp | None = None


@dataclass(frozen=True)
class ReadClip:
    """A clip on its way to the scorer; `reason` says why it has no frames."""

    job: ClipJob
    indices: tuple[int, ...] = ()
    frames: Frames | None = None
    reason: str | None = None


class FrameReader:
    """Reads the chosen frames of a clip; a bad clip is a result, not an exception."""

    def __init__(self, choice: FrameChoice) -> None:
        self.choice = choice

    def __call__(self, job: ClipJob) -> ReadClip:
        """The frames of a clip, or why there are none."""
        if job.row.error is not None:
            return ReadClip(job, reason=job.row.error)
        path, indices = job.entry.path, self.choice.of(job.entry.total_frames)
        try:
            frames = np.concatenate([read_clip(path, index, 1) for index in indices])
            if stamp(path) != job.seen:
                return ReadClip(job, reason="changed while it was read")
        except ClipError as error:
            return ReadClip(job, reason=error.reason)
        except OSError as error:
            return ReadClip(job, reason=error.strerror or str(error))
        return ReadClip(job, indices, frames)


def read_ahead(
    read: FrameReader, jobs: Iterator[ClipJob], threads: int, batch_size: int
) -> Iterator[ReadClip]:
    """Read clips in order, in threads, at most two batches ahead of whoever takes them."""
    if threads == 0:
        yield from map(read, jobs)
        return
    waiting: deque[Future[ReadClip]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for job in jobs:
            waiting.append(pool.submit(read, job))
            if len(waiting) >= 2 * batch_size:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
