"""The address of what is stored about a clip: its bytes, and how they are shown if that takes more than decoding.

An ordinary clip is identified by the sha256 of its bytes. One that is mirrored, made square or converted to SDR is
identified by the sha256 of that and `Presentation.label`: latents, scores and measures made while it was read
differently are no longer found. A refused clip has no hash, so nothing old is found for it either.

Both are remembered, so that a clip's bytes are read for them only once.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np

from luve_lightning.data.clip_container import MP4, ClipError, RefusedClip, may_interlace, opened
from luve_lightning.data.clip_presentation import decode_leniently, presentation_of, require_progressive
from luve_lightning.data.clip_scan import codec_of
from luve_lightning.data.still_files import still_kind
from luve_lightning.data.stills import still_label
from luve_lightning.files import file_digest, text_digest, warn_kept_in_memory
from luve_lightning.locks import JsonLines

if TYPE_CHECKING:
    from av.video.stream import VideoStream


Stamp = tuple[int, int, int]

# A file changed twice within one tick of its file system's clock keeps its stamp (Git calls this "racily clean").
# Ticks are up to 2 s (FAT); a hash of a file changed more recently is used, but not remembered.
_SETTLED_NS = 2_000_000_000
_READERS = 8  # files read at once; a disk gives no more
_SHA256 = re.compile(r"[0-9a-f]{64}")


def stamp(path: Path) -> Stamp:
    """Size in bytes, and the times in nanoseconds at which content and inode last changed.

    The inode time is included because tools such as rsync reset the other one.

    Raises:
        FileNotFoundError: when there is no file.
    """
    info = path.stat()
    return info.st_size, info.st_mtime_ns, info.st_ctime_ns


class FileHashes:
    """sha256 of files by path and stamp, in a JSON-lines file that any number of processes may append to.

    Where that file may not be written, or the disk is full, a hash is remembered only by this object.

    Args:
        root: folder of the cache file, `file_hashes.jsonl`.
    """

    def __init__(self, root: str | Path) -> None:
        self._lines = JsonLines(Path(root) / "file_hashes.jsonl")
        self._known: dict[str, tuple[Stamp, str]] = {}
        self._begun: dict[Path, Future[tuple[Stamp, str]]] = {}
        self._writable = True

    def digest(self, path: str | Path) -> str:
        """sha256 of a file's bytes, 64 hex digits.

        Raises:
            FileNotFoundError: when there is no file.
            OSError: when it cannot be read, or changes while it is read.
        """
        return self.digests([path])[0]

    def digests(self, paths: Sequence[str | Path]) -> list[str]:
        """sha256 of several files' bytes, several read at once: a model of 17 GB takes one core ten seconds.

        Raises:
            OSError: see `digest`; what was read by then is remembered.
        """
        files = [_resolved(path) for path in paths]
        known = [self.known(file) for file in files]
        unread = list(dict.fromkeys(file for file, digest in zip(files, known, strict=True) if digest is None))
        read: dict[Path, str] = {}
        with ThreadPoolExecutor(max(1, min(_READERS, len(unread)))) as pool:
            for file, (seen, digest) in zip(unread, pool.map(self._read, unread), strict=True):
                read[file] = digest
                if time.time_ns() - max(seen[1:]) > _SETTLED_NS:
                    self._remember(str(file), seen, digest)
        return [digest or read[file] for file, digest in zip(files, known, strict=True)]

    def begin(self, paths: Iterable[str | Path]) -> None:
        """Start reading files, the largest first, so that a later `digests` has less to wait for.

        The threads end with the process. What cannot be read is told by `digests`.
        """
        sizes: dict[Path, int] = {}
        for path in paths:
            with suppress(OSError):
                if self.known(path) is None:
                    sizes[_resolved(path)] = stamp(_resolved(path))[0]
        waiting: SimpleQueue[Path] = SimpleQueue()
        for file in sorted(sizes, key=lambda file: -sizes[file]):
            self._begun[file] = Future()
            waiting.put(file)

        def work(begun: Mapping[Path, Future[tuple[Stamp, str]]]) -> None:
            while True:
                try:
                    file = waiting.get_nowait()
                except Empty:
                    return
                try:
                    begun[file].set_result(_read(file))
                except Exception as error:
                    begun[file].set_exception(error)

        for _ in range(min(_READERS, len(sizes))):
            Thread(target=work, args=(dict(self._begun),), daemon=True).start()

    def _read(self, file: Path) -> tuple[Stamp, str]:
        """As `_read`; what `begin` has read counts where the file is still the same."""
        begun = self._begun.pop(file, None)
        if begun is not None:
            with suppress(Exception):
                seen, digest = begun.result()
                if stamp(file) == seen:
                    return seen, digest
        return _read(file)

    def known(self, path: str | Path) -> str | None:
        """The remembered sha256 of the current file, or None. Reads none of its bytes.

        Raises:
            FileNotFoundError: when there is no file.
        """
        file = _resolved(path)
        now = stamp(file)
        if self._known.get(str(file), (None,))[0] != now:
            self._refresh()
        seen, digest = self._known.get(str(file), (None, None))
        return digest if seen == now else None

    def _remember(self, file: str, seen: Stamp, digest: str) -> None:
        self._known[file] = (seen, digest)
        if not self._writable:
            return
        try:
            self._lines.append({"path": file, "stamp": seen, "sha256": digest})
        except OSError as error:
            self._writable = False
            warn_kept_in_memory(self._lines.path.parent, error)

    def _refresh(self) -> None:
        """Read what was appended since the last look, where the file may be read."""
        with suppress(OSError):
            for record in self._lines.new():
                # Another kind of line: hash again when needed.
                with suppress(ValueError, KeyError, TypeError):
                    size, mtime, ctime = record["stamp"]
                    if _SHA256.fullmatch(record["sha256"]):
                        self._known[record["path"]] = ((size, mtime, ctime), record["sha256"])


def _read(file: Path) -> tuple[Stamp, str]:
    """The stamp and the sha256 of a file that stays the same meanwhile."""
    before = stamp(file)
    if not file.is_file():  # a named pipe would wait for ever
        raise OSError(errno.EINVAL, "not a file", str(file))
    digest = file_digest(file)
    if stamp(file) != before:
        raise OSError(f"{file} changed while it was read")
    return before, digest


def _resolved(path: str | Path) -> Path:
    """A path without links; OSError for circular links, which Python 3.11 and 3.12 report as RuntimeError."""
    try:
        return Path(path).resolve()
    except RuntimeError:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None


# Raise it when any file is refused or labelled differently: what is remembered then no longer counts.
_RULES = 2


@dataclass(frozen=True)
class Reading:
    """How a file is read.

    Attributes:
        label: `Presentation.label`; empty for ordinary clips.
        refused: why it is not read at all; empty when it is.
        uneven: whether its frames are unevenly spaced in time (variable frame rate); known only for .mp4 and .mov.
    """

    label: str = ""
    refused: str = ""
    uneven: bool = False


def look(path: Path, matte: str | None = None) -> Reading:
    """Find out how a file is read, from its header and its first picture.

    Args:
        path: the file.
        matte: colour behind the transparent parts of a still; see `luve_lightning.data.stills.read_still`.

    Raises:
        ClipError: nothing in it can be decoded.
        ValueError: for an unknown colour.
    """
    uneven = False
    try:
        if still_kind(path) is not None:
            return Reading(still_label(path, matte))
        with opened(path) as (container, stream):
            if container.format.name == MP4:
                uneven = _uneven(stream)
            frame = next(decode_leniently(container, stream), None)
            if frame is None:
                raise ClipError(path, "has no frame that can be decoded")
            show, index = presentation_of(path, stream, frame), stream.index
            fields = may_interlace(codec_of(stream), stream.codec_context.extradata)
        if fields:
            require_progressive(path, index)
    except RefusedClip as error:
        return Reading(refused=error.reason, uneven=uneven)
    return Reading(show.label, uneven=uneven)


def _uneven(stream: VideoStream) -> bool:
    """Whether the steps in time differ by more than rounding: a tenth of one, or two ticks of the file's clock."""
    gaps = np.diff([entry.timestamp for entry in stream.index_entries])
    return len(gaps) > 1 and bool(np.ptp(gaps) > max(2.0, 0.1 * float(np.median(gaps))))


def shown_digest(path: Path, digest: str) -> str:
    """The hash of a clip as it is shown, 64 hex digits.

    Args:
        path: the file.
        digest: sha256 of its bytes.

    Raises:
        RefusedClip: it is not read at all.
    """
    try:
        return _digest_of(path, digest, look(path))
    except RefusedClip:
        raise
    except ClipError:
        return digest  # whoever reads it finds out


def _digest_of(path: Path, digest: str, reading: Reading) -> str:
    if reading.refused:
        raise RefusedClip(path, reading.refused)
    if not reading.label:
        return digest
    return text_digest(f"{digest}\nshown as: {reading.label}")


def _on(digest: str, matte: str | None) -> str:
    """The name under which a file's reading is remembered: its sha256, or that and the colour behind it."""
    return digest if matte is None else text_digest(f"{digest}\nmatte: {matte}")


class ClipHashes:
    """Hashes of clips as they are shown, and how each is read, remembered so that a file is looked at once.

    Args:
        root: folder of two JSON-lines files, `file_hashes.jsonl` and `clip_readings.jsonl`, that any number of
            processes may append to.
    """

    def __init__(self, root: str | Path) -> None:
        self.files = FileHashes(root)
        self._lines = JsonLines(Path(root) / "clip_readings.jsonl")
        self._known: dict[str, Reading] = {}

    def digest(self, path: str | Path, matte: str | None = None) -> str:
        """The hash of a clip, 64 hex digits; the sha256 of its bytes when it is ordinary or cannot be decoded.

        Args:
            path: the file.
            matte: colour behind the transparent parts of a still; None refuses such a still.

        Raises:
            FileNotFoundError: when there is no file.
            OSError: when it cannot be read, or changes while it is read.
            RefusedClip: it is shown in a way that cannot be reproduced.
        """
        file = Path(path)
        before, digest = stamp(file), self.files.digest(file)
        reading = self._remembered(_on(digest, matte))
        if reading is None:
            try:
                reading = look(file, matte)
            except ClipError as error:
                if isinstance(error.__cause__, (OSError, MemoryError)):
                    # Perhaps temporary: must not be read as if ordinary.
                    raise OSError(error.reason) from error
                return digest  # whoever reads it finds out
            if stamp(file) != before:
                raise OSError(f"{file} changed while it was read")
            self._remember(_on(digest, matte), reading)
        return _digest_of(file, digest, reading)

    def known(self, path: str | Path, matte: str | None = None) -> str | None:
        """The remembered hash of the current file, or None; also None when it is refused. Reads none of it.

        Args:
            path: the file.
            matte: as for `digest`.

        Raises:
            FileNotFoundError: when there is no file.
        """
        digest = self.files.known(path)
        reading = None if digest is None else self._remembered(_on(digest, matte))
        if digest is None or reading is None or reading.refused:
            return None
        return _digest_of(Path(path), digest, reading)

    def uneven(self, paths: Iterable[Path]) -> list[Path]:
        """The clips with a variable frame rate among those whose `digest` was computed, in their order."""
        found = []
        for path in paths:
            with suppress(OSError):
                reading = self._remembered(self.files.digest(path))
                if reading is not None and reading.uneven:
                    found.append(path)
        return found

    def _remembered(self, digest: str) -> Reading | None:
        if digest not in self._known:
            self._refresh()
        return self._known.get(digest)

    def _remember(self, digest: str, reading: Reading) -> None:
        self._known[digest] = reading
        try:
            self._lines.append({"sha256": digest, "rules": _RULES, **asdict(reading)})
        except OSError as error:
            warn_kept_in_memory(self._lines.path.parent, error)

    def _refresh(self) -> None:
        """Read what was appended since the last look, where the file may be read."""
        with suppress(OSError):
            for record in self._lines.new():
                with suppress(KeyError, TypeError):  # from another version
                    if record["rules"] == _RULES:
                        label, refused = str(record["label"]), str(record["refused"])
                        self._known[str(record["sha256"])] = Reading(label, refused, bool(record["uneven"]))
