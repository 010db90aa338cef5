"""What files hold, found by several processes and remembered, so that an unchanged file is looked into once."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luve_lightning.data.clip_container import ClipError
from luve_lightning.data.clip_scan import scan
from luve_lightning.data.hashes import Stamp, stamp
from luve_lightning.data.still_files import still_kind
from luve_lightning.data.stills import check_still
from luve_lightning.files import file_digest, warn_kept_in_memory
from luve_lightning.locks import JsonLines
from luve_lightning.machine import end_with_parent

PROBES = "clip_probes.jsonl"
# Raise it when something else is found in the same file: what is remembered then no longer counts.
_RULES = 1
# A file changed twice within a tick of its file system's clock keeps its stamp; see `luve_lightning.data.hashes`.
_SETTLED_NS = 2_000_000_000
_AHEAD = 4  # files handed out per process: few are lost when one breaks, and none has to wait


@dataclass(frozen=True)
class Probe:
    """What a file holds.

    Attributes:
        width: as shown, pixels.
        height: as shown, pixels.
        frames: number of frames; 1 for a still.
        fps: frames per second on average; 0 for a still.
        uneven: whether the frames are unevenly spaced in time (variable frame rate).
        duration: seconds; None for a still.
        still: whether it is a picture.
        transparent: whether parts of it are transparent.
        reason: why it cannot be used, "what: details"; empty for a clip or still.
    """

    width: int = 0
    height: int = 0
    frames: int = 0
    fps: float = 0.0
    uneven: bool = False
    duration: float | None = None
    still: bool = False
    transparent: bool = False
    reason: str = ""


ProbedFile = tuple[Probe, os.stat_result | None]
"""What `find_probes` says of a file."""


def probe_file(path: Path) -> Probe:
    """What a file holds, by the readers' own scan: what is found is what a player shows.

    Raises:
        OSError: the disk's fault or the machine's, perhaps temporary.
    """
    try:
        if still_kind(path) is not None:
            # Decoded, as only that shows what is cut short or transparent.
            height, width, transparent = check_still(path)
            return Probe(width, height, 1, still=True, transparent=transparent)
        found = scan(path)
    except ClipError as error:
        if isinstance(error.__cause__, OSError | MemoryError):
            raise OSError(error.reason) from None
        return Probe(reason=error.reason)
    info = found.info
    if not info.frames or not info.fps:
        return Probe(reason="does not say how many frames a second it shows" if info.frames else "has no frame")
    lasts = float(found.shown.seconds)
    return Probe(info.width, info.height, info.frames, info.fps, uneven(found.times), lasts)


def uneven(times: NDArray[np.int64]) -> bool:
    """Whether the steps in time differ by more than rounding: a tenth of one, or two ticks of the file's clock."""
    gaps = np.diff(times)
    return len(gaps) > 1 and bool(np.ptp(gaps) > max(2.0, 0.1 * float(np.median(gaps))))


class ProbeCache:
    """Probes and hashes by path and stamp, in a JSON-lines file that any number of processes may append to.

    Files below the cache's folder are remembered by their path from there, so that the folder can be moved.

    Args:
        root: folder of the file, `clip_probes.jsonl`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._lines = JsonLines(root / PROBES)
        self._known: dict[str, tuple[Stamp, str, Probe]] = {}
        self._digests: dict[str, tuple[Stamp, str]] = {}
        self._writable, self._by = True, _readers()

    def load(self) -> None:
        """Read what is remembered, also by other processes meanwhile."""
        names = {field.name for field in fields(Probe)}
        with suppress(OSError):
            for record in self._lines.new():
                with suppress(KeyError, TypeError, ValueError):  # from another version
                    size, mtime, ctime = record["stamp"]
                    seen = (size, mtime, ctime)
                    if "sha256" in record:
                        self._digests[record["path"]] = (seen, str(record["sha256"]))
                    elif record["rules"] == _RULES and set(record["probe"]) == names:
                        self._known[record["path"]] = (seen, record["by"], Probe(**record["probe"]))

    def find(self, path: Path, now: Stamp) -> Probe | None:
        """The probe of a file with this stamp, or None; what other versions of the readers refused is tried again."""
        then, by, probe = self._known.get(self._key(path), (None, "", None))
        return None if probe is None or then != now or (probe.reason and by != self._by) else probe

    def remember(self, path: Path, seen: Stamp, probe: Probe) -> None:
        """Keep a probe, unless the file changed so recently that its stamp may be that of other bytes."""
        key = self._key(path)
        if self._append(seen, {"path": key, "stamp": seen, "rules": _RULES, "by": self._by, "probe": asdict(probe)}):
            self._known[key] = (seen, self._by, probe)

    def digest(self, path: Path, now: Stamp) -> str:
        """sha256 of the bytes of a file with this stamp.

        Raises:
            OSError: it cannot be read.
        """
        key = self._key(path)
        then, digest = self._digests.get(key, (None, ""))
        if then != now:
            digest = file_digest(path)
            if self._append(now, {"path": key, "stamp": now, "sha256": digest}):
                self._digests[key] = (now, digest)
        return digest

    def _append(self, seen: Stamp, record: dict[str, Any]) -> bool:
        """Write down what was found in a file with this stamp; whether it may be remembered at all."""
        if time.time_ns() - max(seen[1:]) <= _SETTLED_NS:
            return False
        if self._writable:
            try:
                self._lines.append(record)
            except OSError as error:
                self._writable = False
                warn_kept_in_memory(self.root, error)
        return True

    def _key(self, path: Path) -> str:
        return str(path).removeprefix(f"{self.root}{os.sep}")


def _readers() -> str:
    import av
    import PIL

    return f"PyAV {av.__version__}, Pillow {PIL.__version__}"


def find_probes(
    paths: Iterable[Path],
    cache: ProbeCache,
    processes: int,
    begin: Callable[[int, int], None],
    advance: Callable[[], None],
) -> dict[Path, ProbedFile]:
    """The probe of each file, and its stat: from the cache, else by looking into it.

    Args:
        paths: the files.
        cache: is asked first, and remembers each probe as it comes.
        processes: processes that look into files, at least 1.
        begin: called once with the number of files to look into, and that of files in the cache.
        advance: called after each of them.
    """
    cache.load()
    found: dict[Path, ProbedFile] = {}
    todo: dict[Path, os.stat_result] = {}
    for path in paths:
        try:
            facts = path.stat()
        except FileNotFoundError:
            missing = "link to nothing" if path.is_symlink() else "file missing"
            found[path] = (Probe(reason=f"{missing}: {path}"), None)
            continue
        except (OSError, ValueError) as error:
            found[path] = (Probe(reason=f"cannot be opened: {getattr(error, 'strerror', None) or error}"), None)
            continue
        probe = cache.find(path, stamp_of(facts))
        if probe is None:
            todo[path] = facts
        else:
            found[path] = (probe, facts)
    begin(len(todo), sum(facts is not None for _, facts in found.values()))
    for path, probe, lasting in _probed(list(todo), processes):
        seen, now = stamp_of(todo[path]), _stamp_now(path)
        if now != seen:
            probe = Probe(reason="changed while it was looked into: run the command again")
        elif lasting:
            cache.remember(path, seen, probe)
        found[path] = (probe, todo[path])
        advance()
    return found


def stamp_of(facts: os.stat_result) -> Stamp:
    """What tells that a file has changed; see `luve_lightning.data.hashes.stamp`."""
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def _stamp_now(path: Path) -> Stamp | None:
    try:
        return stamp(path)
    except OSError:
        return None


Result = tuple[Path, Probe, bool]


def _probed(paths: list[Path], processes: int) -> Iterator[Result]:
    """(file, probe, whether it will be the same next time) of each file, as they come."""
    rest = dict.fromkeys(paths)
    while rest:
        pending: dict[Future[tuple[Probe, bool]], Path] = {}
        try:
            for path, probe, lasting in _in_processes(list(rest), processes, pending):
                del rest[path]
                yield path, probe, lasting
        except BrokenProcessPool:  # one of these ends the process that looks into it: each gets one of its own
            for path in pending.values():
                rest.pop(path, None)
                yield _alone(path)


def _in_processes(
    paths: list[Path], processes: int, pending: dict[Future[tuple[Probe, bool]], Path]
) -> Iterator[Result]:
    # Spawned, not forked: libraries hold threads and locks that a fork would copy in any state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(paths)), context, initializer=end_with_parent) as pool:
        try:
            waiting = iter(paths)
            while True:
                while len(pending) < _AHEAD * processes and (path := next(waiting, None)) is not None:
                    pending[pool.submit(_probe_one, path)] = path
                if not pending:
                    return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    probe, lasting = future.result()
                    yield pending.pop(future), probe, lasting
        finally:
            pool.shutdown(cancel_futures=True)


def _alone(path: Path) -> Result:
    try:
        return next(_in_processes([path], 1, {}))
    except BrokenProcessPool:
        return path, Probe(reason="ends the program that reads it: its decoder crashes, or memory is full"), False


def _probe_one(path: Path) -> tuple[Probe, bool]:
    try:
        return probe_file(path), True
    except OSError as error:
        return Probe(reason=str(error)), False
