"""The index of clips, UltraVideo's CSV, and their split by source video: clips of one look alike and would leak."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
NAMED = 5  # most urls named in a message

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
    *("clip_id", "url", "frame_width", "frame_height", "fps", "start_frame", "end_frame", "total_frames"),
    *("start_time", "end_time", "duration", "vtss_score", "motion_score", "video_clip_score"),
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
        clip_id: names the clip, in an index once; a valid file name (`CLIP_ID`).
        path: file of the clip.
        url: id of its source video; clips of one source are in the same split.
        fps: frames per second; 0 for a still and where the file does not say.
        total_frames: number of frames, by the index; 1 for a still.
        width: pixels, as shown.
        height: pixels, as shown.
        captions: captions by column name: UltraVideo's `CAPTIONS`, or "caption" for clips of one's own.
        still: whether it is a picture.
        uneven: whether its frame rate varies; UltraVideo's CSV does not say.
        duration: seconds; None where the index does not say, and for a still.
    """

    clip_id: str
    path: Path
    url: str
    fps: float
    total_frames: int
    width: int
    height: int
    captions: dict[str, str] = field(repr=False, hash=False)
    still: bool = False
    uneven: bool = False
    duration: float | None = None


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


def hashed_split(url: str, fractions: tuple[float, float, float]) -> Split:
    """The split of a source video: the same on every machine, whatever other videos there are.

    SHA-256 of the url, as a number in [0, 1), falls into the share of train, val or test.

    Args:
        url: id of the source video.
        fractions: shares of train, val and test; they sum to 1.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions: expected three shares >= 0 that sum to 1, got {fractions}")
    place = int.from_bytes(hashlib.sha256(url.encode()).digest()[:8], "big") / 2**64
    if place < fractions[0]:
        return "train"
    return "val" if place < fractions[0] + fractions[1] else "test"


def read_splits(path: Path, used: Iterable[str], known: Iterable[str]) -> dict[str, Split] | None:
    """The split of each url in a `splits.json`, or None where there is no such file.

    Args:
        path: the file: {"train": [url, ...], "val": [...], "test": [...]}.
        used: urls that must be in it.
        known: urls that may be in it; others cause a warning, which names them.

    Raises:
        VideoIndexError: not such a file, a url that is listed twice, or one that is not listed.
    """
    if not os.path.lexists(path):
        return None
    if not path.is_file():  # otherwise the hash would decide, and clips of the test split would train
        raise VideoIndexError(f"{path}: {'a link to nothing' if path.is_symlink() else 'not a file'}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise VideoIndexError(f"{path}: not JSON ({error})") from None
    split_of: dict[str, Split] = {}
    for split, urls in _lists(path, content).items():
        for url in urls:
            if url in split_of:
                raise VideoIndexError(f"{path}: {url!r} is listed twice, in {split_of[url]} and in {split}")
            split_of[url] = split
    missing = sorted(set(used) - split_of.keys())
    if missing:
        raise VideoIndexError(f"{path}: {len(missing)} urls of the CSV are not listed: {_some(missing)}")
    unknown = sorted(split_of.keys() - set(known))
    if unknown:
        warnings.warn(f"{path}: {len(unknown)} urls are not in the CSV: {_some(unknown)}", stacklevel=2)
    return split_of


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object with unique keys; `json` keeps the last of equal ones."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return content


def _lists(path: Path, content: Any) -> dict[Split, list[str]]:
    if not isinstance(content, dict) or set(content) != set(SPLITS):
        keys = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise VideoIndexError(f"{path}: expected the keys {', '.join(SPLITS)}, got {keys}")
    for split, urls in content.items():
        if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
            raise VideoIndexError(f"{path}: {split}: expected a list of urls")
    return content


def _some(urls: list[str]) -> str:
    return ", ".join(urls[:NAMED]) + (f" and {len(urls) - NAMED} more" if len(urls) > NAMED else "")


class VideoIndex:
    """The usable clips of a CSV, and why the others are not.

    Args:
        entries: the clips, in the CSV's order.
        dropped: (clip_id, reason) of every row left out; a reason is "what: details".
        source: the CSV, for messages.
        splits: the split of each url, if given; None computes it from the url.
    """

    def __init__(
        self,
        entries: Sequence[ClipEntry],
        dropped: Sequence[tuple[str, str]] = (),
        source: Path | None = None,
        splits: Mapping[str, Split] | None = None,
    ) -> None:
        self.entries, self.dropped, self.source = list(entries), list(dropped), source
        self.splits = None if splits is None else dict(splits)

    @classmethod
    def from_csv(
        cls,
        path: str | Path,
        folder: str | Path | None = None,
        keep: Limits = Limits(),  # frozen
    ) -> VideoIndex:
        """Read and check a CSV with UltraVideo's columns.

        A `splits.json` beside it, {"train": [url, ...], "val": [...], "test": [...]}, fixes the split.

        Args:
            path: the CSV. Columns may come in any order; more than UltraVideo's cause a warning.
            folder: folder of the clips; default `clips/` beside the CSV, else the CSV's folder.
            keep: which clips to take.

        Raises:
            FileNotFoundError: no such CSV or folder.
            VideoIndexError: not such a CSV, or no usable row.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such CSV{_how_to_get(path)}")
        beside = path.parent / "clips"
        clips = Path(folder) if folder is not None else beside if beside.is_dir() else path.parent
        if not clips.is_dir():
            raise FileNotFoundError(f"{clips}: no such folder of clips")
        index, urls = cls([], source=path), set[str]()
        try:
            index._read(path, clips, keep, urls)
        except UnicodeDecodeError as error:
            raise VideoIndexError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        index.splits = read_splits(path.with_name("splits.json"), {entry.url for entry in index.entries}, urls)
        if not index.entries:
            counts = ", ".join(f"{count} {what}" for what, count in index._counts()) or "it has no rows"
            raise VideoIndexError(f"{path}: no clip can be used: {counts} (folder {clips})")
        return index

    def _read(self, path: Path, folder: Path, keep: Limits, urls: set[str]) -> None:
        """Take the rows of a CSV that are clips, note why the others are not, and collect the urls of all."""
        with os.scandir(folder) as found:  # one sweep: asking for each of 42,000 clips takes minutes on a network disk
            files = {item.name for item in found}
        stems = {name.rpartition(".")[0]: name for name in files}
        seen: set[str] = set()
        for row in _dictionaries(path):
            clip_id, url = row.get("clip_id", "").strip(), row.get("url", "").strip()
            urls.add(url)
            try:
                entry = _entry(row, clip_id, url, folder)
                if clip_id in seen:
                    raise _RowError("duplicate clip_id: an earlier row has it")
                seen.add(clip_id)
                if entry.path.name not in files:
                    other = f" ({stems[clip_id]} is there)" if clip_id in stems else ""
                    raise _RowError(f"file missing: {entry.path}{other}")
                keep.check(entry)
                self.entries.append(entry)
            except _RowError as error:
                self.dropped.append((clip_id, str(error)))

    def __len__(self) -> int:
        return len(self.entries)

    def split(self, name: Split, fractions: tuple[float, float, float] = (0.9, 0.05, 0.05)) -> list[ClipEntry]:
        """The clips of one split. All clips of a source video are in the same one.

        Args:
            name: "train", "val" or "test".
            fractions: shares of the source videos in this order; they sum to 1. Ignored where `splits.json` says
                which video is where.
        """
        if name not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {name!r}")
        urls = dict.fromkeys(entry.url for entry in self.entries)
        split_of = self.splits if self.splits is not None else {u: hashed_split(u, fractions) for u in urls}
        return [entry for entry in self.entries if split_of[entry.url] == name]

    def summary(self) -> str:
        """What the index holds and what was dropped, as lines of text."""
        urls = len({entry.url for entry in self.entries})
        kept = f"{len(self.entries)} clips of {urls} source videos"
        lines = [f"{self.source or 'index'}: {kept}, {len(self.dropped)} rows dropped"]
        for what, count in self._counts():
            clip_id, reason = next(pair for pair in self.dropped if _what(pair[1]) == what)
            details = reason.partition(": ")[2]
            lines.append(f"  {count:6d}  {what} (first: {' '.join(filter(None, (clip_id, details)))})")
        return "\n".join(lines)

    def _counts(self) -> list[tuple[str, int]]:
        return Counter(_what(reason) for _, reason in self.dropped).most_common()


def _how_to_get(path: Path) -> str:
    """The end of the message on a missing CSV: where it was looked for, and what makes the mini world's."""
    place = "" if path.is_absolute() else f" in {Path.cwd()}, to which the path is relative"
    made = path.parts[-3:] == ("mini", "world", path.name)
    return place + ("; `make mini-world` renders the mini world's, in the repository" if made else "")


def _what(reason: str) -> str:
    return reason.partition(": ")[0]


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
        if unknown:
            parts.append(f"unknown columns: {', '.join(_with_guess(name, missing) for name in unknown)}")
        raise VideoIndexError(f"{csv_path}: {'; '.join(parts)} (expected UltraVideo's {len(COLUMNS)} columns)")
    if unknown:
        names = ", ".join(name or "one without a name" for name in unknown)
        warnings.warn(f"{csv_path}: columns not used: {names}", stacklevel=2)


def _with_guess(name: str, missing: list[str]) -> str:
    close = difflib.get_close_matches(name.strip().lower(), [m.lower() for m in missing], n=1)
    guess = next((m for m in missing if close and m.lower() == close[0]), None)
    return f"{name!r} (did you mean {guess!r}?)" if guess else repr(name)


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
