"""Videos of several methods and their originals, matched by file name, and their prompts; videos to be enlarged."""

from __future__ import annotations

import csv
import io
import json
import re
import threading
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from luve_lightning.data.clip_container import ClipError, Frames
from luve_lightning.data.clips import probe_clip
from luve_lightning.data.hashes import Stamp, stamp
from luve_lightning.data.video_files import (
    PICTURE_SUFFIXES,
    VIDEO_SUFFIXES,
    check_name,
    find_videos,
    read_video,
    video_name,
)
from luve_lightning.data.video_index import ClipEntry
from luve_lightning.files import find_json

PROMPT = "prompt"
"""The name of a video's caption."""
_NAMES = ("name", "video", "clip_id", "file")


@dataclass(frozen=True)
class VideoSets:
    """Videos to evaluate.

    Attributes:
        methods: each method's files by `video_name`, methods in the table's order.
        originals: files by name that methods are compared with; empty when there are none.
        prompts: prompts by name, where known.
        motions: motion videos of each method's videos by name, where known.
    """

    methods: dict[str, dict[str, Path]]
    originals: dict[str, Path]
    prompts: dict[str, str]
    motions: dict[str, dict[str, Path]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Every name that a method or the originals have, sorted."""
        return sorted({name for files in self.methods.values() for name in files} | self.originals.keys())

    def missing(self) -> dict[str, list[str]]:
        """For each method, the names that others have and it lacks; complete methods are left out."""
        every = {name for files in self.methods.values() for name in files}
        lacking = {method: sorted(every - files.keys()) for method, files in self.methods.items()}
        return {method: names for method, names in lacking.items() if names}

    def without_original(self) -> list[str]:
        """Names that some method has and the originals lack; none when there are no originals at all."""
        every = {name for files in self.methods.values() for name in files}
        return sorted(every - self.originals.keys()) if self.originals else []


def find_video_sets(
    methods: Mapping[str, Path], originals: Path | None = None, prompts: Path | None = None, motion: Path | None = None
) -> VideoSets:
    """Find the files.

    Args:
        methods: folder of each method.
        originals: folder of what the methods should have made.
        prompts: CSV or JSONL with the columns `name` (or `video`, `clip_id`) and `prompt`; without it, the
            `prompt` in a JSON file of the same name beside each video. A video without one is no error.
        motion: folder of motion videos, for videos that have none of their own: those that `luve generate` kept with
            `keep_stages`, or that `luve upsample` enlarged, as the JSON file beside each video says.

    Raises:
        FileNotFoundError: a folder or file is missing, or a folder has no video.
        ValueError: no methods, a bad name of one, unreadable prompts, or no name in common with the originals or
            with the motion videos.
    """
    if not methods:
        raise ValueError("videos: expected at least one method, as --videos NAME=DIR")
    for method in methods:
        check_name(method, "videos:")
    files = {method: _by_name(f"videos.{method}", folder) for method, folder in methods.items()}
    references = {} if originals is None else _by_name("reference", originals)
    if references and not any(references.keys() & found.keys() for found in files.values()):
        raise ValueError(f"reference: no video in {originals} has the name of a video of {', '.join(methods)}")
    given = {} if motion is None else _by_name("motion", motion)
    if given and not any(given.keys() & found.keys() for found in files.values()):
        raise ValueError(f"motion: no video in {motion} has the name of a video of {', '.join(methods)}")
    motions = {method: _motion_videos(found, given) for method, found in files.items()}
    everything = [path for found in [references, *files.values()] for path in found.values()]
    if prompts is None:
        return VideoSets(files, references, _prompts_beside(everything), motions)
    texts = read_prompts(prompts)
    if not texts.keys() & {video_name(path) for path in everything}:
        raise ValueError(f"prompts: none of the {len(texts)} names in {prompts} is that of a video")
    return VideoSets(files, references, texts, motions)


def read_prompts(path: Path) -> dict[str, str]:
    """Prompts by video name from a CSV or JSONL file; a suffix of the name is dropped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, or columns missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"prompts: {path}: no such file")
    readers = {".csv": _csv_rows, ".jsonl": _json_rows}
    if path.suffix.lower() not in readers:
        raise ValueError(f"prompts: {path}: expected a .csv or a .jsonl file")
    try:
        rows = list(readers[path.suffix.lower()](path.read_bytes().decode("utf-8-sig")))
    except (UnicodeDecodeError, csv.Error, ValueError, RecursionError) as error:
        raise ValueError(f"prompts: {path}: cannot be read: {error}") from None
    prompts: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        key = next((key for key in _NAMES if isinstance(row, dict) and row.get(key)), None)
        if key is None or not isinstance(row.get("prompt"), str):
            raise ValueError(f"prompts: {path}: row {number}: expected the keys name and prompt, got {row}")
        if None in row:  # fields of a CSV beyond its columns
            raise ValueError(
                f"prompts: {path}: row {number}: more cells than columns; put a text with commas in double quotes"
            )
        name = unicodedata.normalize("NFC", str(row[key]))
        name = video_name(name) if Path(name).suffix.lower() in (*VIDEO_SUFFIXES, *PICTURE_SUFFIXES) else name
        if prompts.setdefault(name, row["prompt"]) != row["prompt"]:
            raise ValueError(f"prompts: {path}: row {number}: {name} has another prompt in an earlier row")
    return prompts


def _csv_rows(text: str) -> Iterable[Any]:
    return csv.DictReader(io.StringIO(text, newline=""), strict=True)  # an open quote swallows rows


def _json_rows(text: str) -> Iterable[Any]:
    # Lines end at CR and LF only: U+2028 and the like may stand inside a prompt.
    return (json.loads(line) for line in re.split(r"\r\n|\r|\n", text) if line.strip())


def _by_name(key: str, folder: Path) -> dict[str, Path]:
    try:
        return {video_name(path): path for path in find_videos(folder, pictures=True)}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _motion_videos(files: Mapping[str, Path], given: Mapping[str, Path]) -> dict[str, Path]:
    """The motion video of each video that has one: what was kept of its own, else a given one of its name."""
    found = {}
    for name, path in files.items():
        about = find_json(path.with_suffix(".json"))
        stages, enlarged = about.get("stages"), about.get("enlarged_from")
        kept = path.parent / "motion" / path.name
        if isinstance(enlarged, str):
            told, kept = True, path.parent / enlarged
        else:
            told = isinstance(stages, list) and any(isinstance(s, dict) and s.get("stage") == "motion" for s in stages)
        if told and kept.is_file():
            found[name] = kept
        elif name in given:
            found[name] = given[name]
    return found


def _prompts_beside(paths: Iterable[Path]) -> dict[str, str]:
    found: dict[str, tuple[str, Path]] = {}
    for path in paths:
        beside, name = path.with_suffix(".json"), video_name(path)
        if not beside.is_file():
            continue
        try:
            content = json.loads(beside.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{beside}: not JSON ({error})") from None
        if isinstance(content, dict) and isinstance(content.get("prompt"), str):
            prompt, first = found.setdefault(name, (content["prompt"], beside))
            if prompt != content["prompt"]:
                raise ValueError(
                    f"prompts: {first} and {beside} have different prompts for {name}; say which with --prompts FILE"
                )
    return {name: prompt for name, (prompt, _) in found.items()}


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


def low_resolution_videos(folder: Path) -> tuple[list[ClipEntry], list[tuple[str, str]]]:
    """The videos of a folder as clips to enlarge, and (name, reason) of those that cannot be read.

    A video's prompt is that of the JSON file of its name beside it, or in the folder above, where `luve generate
    --keep_stages true` has it for the videos of `motion/`; without one, the video has no caption.

    Raises:
        FileNotFoundError: no such folder, or no video in it.
    """
    entries, unreadable = list[ClipEntry](), list[tuple[str, str]]()
    for path in find_videos(folder, pictures=True):
        name, still = video_name(path), path.suffix.lower() in PICTURE_SUFFIXES
        beside = path.with_suffix(".json")
        records = [find_json(beside), find_json(folder.resolve().parent / beside.name)]
        prompts = [about["prompt"] for about in records if isinstance(about.get("prompt"), str)]
        try:
            info = probe_clip(path)
            if not info.fps and not still:
                raise ClipError(path, "does not say its frames per second")
        except ClipError as error:
            unreadable.append((name, error.reason))
            continue
        captions = {PROMPT: prompts[0]} if prompts else {}
        entries.append(
            ClipEntry(name, path, name, info.fps, info.frames, info.width, info.height, captions, still=still)
        )
    return entries, unreadable
