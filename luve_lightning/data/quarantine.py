"""The list of clips that could not be read, shared by all workers and processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from luve_lightning.data.clip_container import ClipError
from luve_lightning.files import warn_kept_in_memory
from luve_lightning.locks import JsonLines
from luve_lightning.terminal import amount

T = TypeVar("T")
SHOWN = 5  # most clips named in the message of TooManyBadClips
ALWAYS_ALLOWED = 2  # bad clips that stop no run, unless none are allowed: one of 14 is more than 5 %


class TooManyBadClips(RuntimeError):
    """More clips than allowed cannot be read; the message lists some of them.

    Args:
        message: message for the user.
    """

    def __init__(self, message: str) -> None:
        # A DataLoader re-raises a worker's exception with the worker's traceback before its message. The traceback
        # only says that a clip was being read; the user needs the list.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2])


@dataclass(frozen=True)
class BadClip:
    """One line of the list.

    Attributes:
        clip_id: stem of the file.
        path: the file.
        reason: what is wrong with it.
        time: when it was found, ISO 8601, UTC.
        size: size of the file at that time, bytes; None when it was missing.
        changed_ns: when it was last changed, ns since 1970; None when it was missing.
    """

    clip_id: str
    path: str
    reason: str
    time: str
    size: int | None
    changed_ns: int | None

    @classmethod
    def now(cls, error: ClipError) -> BadClip:
        """The line for a clip that has just failed."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(error.path.stem, str(error.path), error.reason, time, *_facts(error.path))

    def holds(self) -> bool:
        """Whether the file is still the one that failed."""
        return (self.size, self.changed_ns) == _facts(Path(self.path))


class Quarantine:
    """Names each bad clip once, in a JSON-lines file, and stops the run when there are too many.

    The file belongs to one run folder. All DataLoader workers and processes of the run write to it; each line is
    appended in one write under a lock, so lines are complete and no clip is listed twice. A resumed run continues
    it; a clip replaced since then no longer counts. Where the file may not be written, only this object lists a
    clip.

    Args:
        path: the file; created, with its folders, when the first clip fails. None keeps the list in memory,
            separately for each worker.
        max_bad_fraction: largest share of `total` that may be bad, in [0, 1]. Unless it is 0, `ALWAYS_ALLOWED`
            clips may be bad in any case, as long as one is left.
        total: number of clips, >= 1.
        clips: the clips themselves, where the file may also name clips of another index, from a run that shares
            the store. None counts all that are listed.
    """

    def __init__(
        self, path: str | Path | None, max_bad_fraction: float, total: int, clips: Iterable[Path] | None = None
    ) -> None:
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction: expected a share in [0, 1], got {max_bad_fraction}")
        if total < 1:
            raise ValueError(f"total: expected at least one clip, got {total}")
        self.path = None if path is None else Path(path)
        self.max_bad_fraction, self.total = max_bad_fraction, total
        self._own = None if clips is None else {str(clip) for clip in clips}
        self._bad: dict[str, BadClip] = {}
        self._lines = None if path is None else JsonLines(Path(path))

    def add(self, error: ClipError) -> None:
        """List the clip, unless it is listed.

        Raises:
            TooManyBadClips: more than the allowed share is bad now.
        """
        bad = BadClip.now(error)
        if self._lines is None:
            self._bad.setdefault(bad.path, bad)
        elif bad.path not in self._bad:
            try:
                if not self._lists(bad):  # what is listed need not be writable
                    self._lines.append(asdict(bad), unless=lambda: self._lists(bad))
                    self._look()
            except OSError as error:
                warn_kept_in_memory(self._lines.path.parent, error)
                self._bad[bad.path] = bad
        if len(self._counted()) > self.allowed:
            raise TooManyBadClips(self.describe())

    @property
    def allowed(self) -> float:
        """How many clips may be bad."""
        always = min(ALWAYS_ALLOWED, self.total - 1) if self.max_bad_fraction > 0 else 0
        return max(self.max_bad_fraction * self.total, always)

    def bad(self) -> list[BadClip]:
        """The clips listed so far, by anyone, in the order of discovery."""
        self._look()
        return self._counted()

    def too_many(self) -> bool:
        """Whether more than allowed are bad."""
        return len(self.bad()) > self.allowed

    def _lists(self, bad: BadClip) -> bool:
        self._look()
        return bad.path in self._bad

    def _look(self) -> None:
        """Read the lines written since the last look; all of them when somebody deleted or emptied the file."""
        for record in [] if self._lines is None else self._lines.new(self._bad.clear):
            clip = _parsed(record)
            if clip is not None and clip.holds():
                self._bad.setdefault(clip.path, clip)

    def _counted(self) -> list[BadClip]:
        return [clip for clip in self._bad.values() if self._own is None or clip.path in self._own]

    def describe(self) -> str:
        """How many clips are bad, and the first few with their reasons, in one line."""
        bad = self.bad()
        share = self.max_bad_fraction * self.total
        allowed = f"{self.allowed} clips" if self.allowed > share else f"{self.max_bad_fraction:.1%}"
        some = "; ".join(f"{clip.path}: {clip.reason}" for clip in bad[:SHOWN])
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        listed = f" (listed in {self.path}; delete it to start the count again)" if self.path and bad else ""
        return (
            f"{len(bad)} of {amount(self.total, 'clip')} cannot be read "
            f"({len(bad) / self.total:.1%}, {allowed} allowed): {some}{more}{listed}"
        )


def first_readable(index: int, length: int, read: Callable[[int], T], quarantine: Quarantine) -> tuple[int, T]:
    """Read an item, or the next readable one, so that batches stay full.

    The replacement depends only on the files, not on earlier failures: a resumed run sees the same items.

    Args:
        index: the item wanted.
        length: number of items; the first follows the last.
        read: reads an item, or raises ClipError.
        quarantine: lists those that failed.

    Returns:
        The index that was read, and the item.

    Raises:
        TooManyBadClips: too many failed, or all of them.
    """
    for step in range(length):
        candidate = (index + step) % length
        try:
            return candidate, read(candidate)
        except ClipError as error:
            quarantine.add(error)
    raise TooManyBadClips(f"no clip can be read: {quarantine.describe()}")


def _facts(path: Path) -> tuple[int | None, int | None]:
    try:
        facts = path.stat()
    except OSError:
        return None, None
    return facts.st_size, facts.st_mtime_ns


def _parsed(record: dict[str, Any]) -> BadClip | None:
    try:
        clip = BadClip(**record)
    except TypeError:  # not ours
        return None
    sound = isinstance(clip.path, str) and "\0" not in clip.path and isinstance(clip.reason, str)
    return clip if sound else None
