"""Reading UltraVideo's CSV: its columns, and what makes a row a clip."""

from __future__ import annotations

import csv
import difflib
import math
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CAPTIONS = (
    "Brief Description",
    "Detailed Description",
    "Background",
    "Theme Description",
    "Style",
    "Shot Type",
    "Camera Movement",
    "Lighting",
    "Video Atmosphere",
    "Summarized Description",
)
"""The columns that hold text about the clip."""

COLUMNS = (
    "clip_id",
    "url",
    "frame_width",
    "frame_height",
    "fps",
    "start_frame",
    "end_frame",
    "total_frames",
    "start_time",
    "end_time",
    "duration",
    "vtss_score",
    "motion_score",
    "video_clip_score",
    *CAPTIONS,
)
"""UltraVideo's columns, in its order."""

CLIP_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")  # a valid file name on any system, never a path
MAX_SIDE = 16384  # pixels; UltraVideo's widest frame has 7680
MAX_FPS = 240


class VideoIndexError(ValueError):
    """A CSV or splits.json that cannot be used; the message is one line that says why."""


class _RowError(ValueError):
    """What is wrong with a row: "what: details"."""


@dataclass(frozen=True)
class ClipEntry:
    """One clip.

    Attributes:
        clip_id: names the clip and its file.
        path: file of the clip, `<clip_id>.mp4`.
        url: id of its source video.
        fps: frames per second.
        total_frames: number of frames, by the CSV.
        width: pixels.
        height: pixels.
        captions: captions by column name (`CAPTIONS`).
    """

    clip_id: str
    path: Path
    url: str
    fps: float
    total_frames: int
    width: int
    height: int
    captions: dict[str, str] = field(repr=False, hash=False)


@dataclass(frozen=True)
class Limits:
    """Which clips to take, by the CSV. It is no part of a stored latent's address.

    Attributes:
        min_frames: take clips of at least this many frames.
        min_height: take clips at least this high as they are shown, pixels.
        min_width: take clips at least this wide as they are shown, pixels.
        fps_range: take clips with a frame rate within, both ends included; null takes all.
    """

    min_frames: int = 1
    min_height: int = 1
    min_width: int = 1
    fps_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if min(self.min_frames, self.min_height, self.min_width) < 1:
            raise ValueError(
                f"expected min_frames, min_height and min_width of at least 1, got {self.min_frames}, "
                f"{self.min_height} and {self.min_width}"
            )
        low, high = self.fps_range or (0, math.inf)
        if not 0 <= low <= high:
            raise ValueError(f"fps_range: expected the lowest and the highest rate, got {low:g} and {high:g}")

    def check(self, entry: ClipEntry) -> None:
        """Raise when the clip should not be taken."""
        if entry.total_frames < self.min_frames:
            raise _RowError(f"too few frames: {entry.total_frames}, at least {self.min_frames} wanted")
        if entry.height < self.min_height or entry.width < self.min_width:
            wanted = f"{self.min_width}x{self.min_height}"
            raise _RowError(f"frame too small: {entry.width}x{entry.height}, at least {wanted} wanted")
        low, high = self.fps_range or (0, math.inf)
        if not low <= entry.fps <= high:
            raise _RowError(f"frame rate not wanted: {entry.fps:g}, {low:g} to {high:g} wanted")


@dataclass
class IndexRows:
    """The contents of a CSV: clips, (clip_id, reason) of the rows left out, and the urls of all rows."""

    entries: list[ClipEntry] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    urls: set[str] = field(default_factory=set)


def read_rows(csv_path: Path, folder: Path, limits: Limits) -> IndexRows:
    """Read and check every row of a CSV.

    Args:
        csv_path: the CSV, UTF-8.
        folder: folder of the clips.
        limits: which clips to take.

    Raises:
        VideoIndexError: not a CSV, or columns are missing.
    """
    found = IndexRows()
    files = _file_names(folder)
    stems = {name.rpartition(".")[0]: name for name in files}
    seen: set[str] = set()
    try:
        for row in _dictionaries(csv_path):
            clip_id, url = row.get("clip_id", "").strip(), row.get("url", "").strip()
            found.urls.add(url)
            try:
                entry = _entry(row, clip_id, url, folder)
                if clip_id in seen:
                    raise _RowError("duplicate clip_id: an earlier row has it")
                seen.add(clip_id)
                if entry.path.name not in files:
                    other = f" ({stems[clip_id]} is there)" if clip_id in stems else ""
                    raise _RowError(f"file missing: {entry.path}{other}")
                limits.check(entry)
                found.entries.append(entry)
            except _RowError as error:
                found.dropped.append((clip_id, str(error)))
    except UnicodeDecodeError as error:
        raise VideoIndexError(f"{csv_path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    return found


def _dictionaries(csv_path: Path) -> Iterator[dict[str, str]]:
    """The rows by column name; an empty one stands for a row with too few or too many fields."""
    with csv_path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)  # an open quote swallows rows
        try:
            header = next(reader, [])
            _check_columns(csv_path, header)
            for fields in reader:
                if fields:  # blank lines are no rows
                    yield dict(zip(header, fields, strict=True)) if len(fields) == len(header) else {}
        except csv.Error as error:
            raise VideoIndexError(f"{csv_path}: line {reader.line_num}: not CSV ({error})") from None


def _check_columns(csv_path: Path, header: list[str]) -> None:
    if len(header) == 1:
        sign = next((sign for sign in (";", "\t", "|") if sign in header[0]), None)
        if sign is not None:
            raise VideoIndexError(f"{csv_path}: its columns are separated by {sign!r}, expected commas")
    missing = [name for name in COLUMNS if name not in header]
    unknown = [name for name in header if name not in COLUMNS]
    repeated = sorted({name for name in header if header.count(name) > 1})
    if missing or repeated:
        parts = [f"missing columns: {', '.join(missing)}"] if missing else []
        parts += [f"columns given twice: {', '.join(repeated)}"] if repeated else []
        parts += (
            [f"unknown columns: {', '.join(_with_guess(n, missing) for n in unknown)}"] if unknown else []
        )
        raise VideoIndexError(
            f"{csv_path}: {'; '.join(parts)} (expected UltraVideo's {len(COLUMNS)} columns)"
        )
    if unknown:
        warnings.warn(
            f"{csv_path}: columns not used: {', '.join(name or 'one without a name' for name in unknown)}",
            stacklevel=2,
        )


def _with_guess(name: str, missing: list[str]) -> str:
    close = difflib.get_close_matches(name.strip().lower(), [m.lower() for m in missing], n=1)
    guess = next((m for m in missing if close and m.lower() == close[0]), None)
    return f"{name!r} (did you mean {guess!r}?)" if guess else repr(name)


def _file_names(folder: Path) -> set[str]:
    """Names in a folder, in one sweep: asking for each of 42,000 clips takes minutes on a network disk."""
    with os.scandir(folder) as found:
        return {item.name for item in found}


def _entry(row: dict[str, str], clip_id: str, url: str, folder: Path) -> ClipEntry:
    if not row:
        raise _RowError("malformed row: too few or too many fields")
    if not CLIP_ID.fullmatch(clip_id):
        raise _RowError(f"bad clip_id: {clip_id!r}, letters, digits, '.', '_' and '-' expected")
    if not url:
        raise _RowError("no url")
    return ClipEntry(
        clip_id=clip_id,
        path=folder / f"{clip_id}.mp4",
        url=url,
        fps=_number(row, "fps", 1, MAX_FPS),
        total_frames=_whole(row, "total_frames", 1, math.inf),
        width=_whole(row, "frame_width", 1, MAX_SIDE),
        height=_whole(row, "frame_height", 1, MAX_SIDE),
        captions={name: row[name] for name in CAPTIONS},
    )


def _number(row: dict[str, str], column: str, low: float, high: float) -> float:
    text = row[column]
    try:
        value = float(text)
    except ValueError:
        raise _RowError(f"bad {column}: {text!r} is not a number") from None
    if not low <= value <= high or math.isinf(value):
        raise _RowError(f"bad {column}: {text}, {low:g} to {high:g} expected")
    return value


def _whole(row: dict[str, str], column: str, low: float, high: float) -> int:
    value = _number(row, column, low, high)
    if value != int(value):
        raise _RowError(f"bad {column}: {row[column]}, a whole number expected")
    return int(value)
