"""Decoding videos in threads ahead of the caller, in order, within a memory limit."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from luve_lightning.data.clip_container import ClipError, Frames
from luve_lightning.data.clips import probe_clip
from luve_lightning.data.hashes import Stamp, stamp
from luve_lightning.data.video_files import read_video

T = TypeVar("T")


@dataclass(frozen=True)
class Decoded(Generic[T]):
    """A video on its way to the metrics; `reason` says why it has no frames.

    Attributes:
        job: the caller's own identifier.
        frames: uint8 T x H x W x 3.
        fps: frames per second.
        reason: None when it was read.
    """

    job: T
    frames: Frames | None = None
    fps: float = 0.0
    reason: str | None = None


class MemoryGate:
    """Admits decoders one after another, as long as their output fits.

    The video that is waited for always gets in: one that is larger than the limit is decoded all the same, alone.

    Args:
        limit: bytes of decoded frames at any time.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._used = self._next = 0
        self._awaited = -1
        self._open = False
        self._changed = threading.Condition()

    def enter(self, ticket: int, size: int) -> None:
        """Wait until every earlier ticket has entered and there is room.

        Args:
            ticket: number of the video, from 0; each enters once.
            size: bytes that it will take.

        Raises:
            CancelledError: the videos are no longer wanted.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._open
                    or (
                        ticket == self._next
                        and (ticket <= self._awaited or not self._used or self._used + size <= self.limit)
                    )
                )
            )
            if self._open:
                raise CancelledError
            self._next += 1
            self._used += size
            self._changed.notify_all()

    def leave(self, size: int) -> None:
        """Release the room of a video."""
        with self._changed:
            self._used -= size
            self._changed.notify_all()

    def open(self) -> None:
        """Turn everybody away: whoever enters, or waits to, gets a CancelledError."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def await_ticket(self, ticket: int) -> None:
        """Declare that this video is needed next."""
        with self._changed:
            self._awaited = ticket
            self._changed.notify_all()


def decode_ahead(
    jobs: Sequence[T],
    path_of: Callable[[T], Path],
    seen: Callable[[T], Stamp],
    keep: Callable[[T], bool],
    threads: int,
    limit: int,
) -> Iterator[Decoded[T]]:
    """Decode videos in order.

    The frames of a video belong to the caller until it takes the next one; kept frames, until it takes the kept
    one after the next.

    Args:
        jobs: the videos in order.
        path_of: gives the file of a job.
        seen: stamp of its file when it was hashed; a file with another stamp is not what was hashed.
        keep: whether the caller uses the frames while it takes further videos, until it takes the next that it
            keeps.
        threads: decoding threads, one video each at a time.
        limit: bytes of decoded frames at any time, except for a single larger video.

    Yields:
        Every job; unreadable ones with the reason.
    """
    gate = MemoryGate(limit)

    def work(ticket: int, job: T) -> tuple[Decoded[T], int]:
        size, path = 0, path_of(job)
        try:
            try:
                info = probe_clip(path)
                size = info.frames * info.height * info.width * 3
            finally:
                gate.enter(ticket, size)
            frames, fps = read_video(path)
            if stamp(path) != seen(job):
                return Decoded(job, reason="changed while it was read"), size
            return Decoded(job, frames, fps), size
        except ClipError as error:
            return Decoded(job, reason=error.reason or str(error)), size
        except OSError as error:
            return Decoded(job, reason=error.strerror or str(error)), size
        except MemoryError:
            return Decoded(job, reason="does not fit into memory"), size

    waiting: deque[Future[tuple[Decoded[T], int]]] = deque()
    rest = iter(enumerate(jobs))
    kept = held = 0
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        for number in range(len(jobs)):
            gate.await_ticket(number)
            while len(waiting) < 2 * threads and (following := next(rest, None)) is not None:
                waiting.append(pool.submit(work, *following))
            decoded, size = waiting.popleft().result()
            if keep(decoded.job):
                gate.leave(kept)
                kept, held = size, 0
            else:
                held = size
            yield decoded
            del decoded
            gate.leave(held)
            held = 0
    finally:
        for future in waiting:
            future.cancel()
        gate.open()
        pool.shutdown()
