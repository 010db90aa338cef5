"""The index of clips: UltraVideo's CSV, or the Parquet file that `luve index` writes from files of one's own."""

from __future__ import annotations

import csv
import difflib
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from luve_lightning.data.splits import FRACTIONS, hashed_split, read_splits
from luve_lightning.data.splits import SPLITS as SPLITS
from luve_lightning.data.splits import Split as Split
from luve_lightning.data.splits import VideoIndexError as VideoIndexError
from luve_lightning.terminal import amount

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
"""UltraVideo's columns that hold text about the clip."""

CAPTION = "caption"
"""The column of the captions of clips of one's own."""

COLUMNS = (
    *("clip_id", "url", "frame_width", "frame_height", "fps", "start_frame", "end_frame", "total_frames"),
    *("start_time", "end_time", "duration", "vtss_score", "motion_score", "video_clip_score"),
    *CAPTIONS,
)
"""UltraVideo's columns, in its order."""

PARTS = ("split", "photograph", "motion", "sprite", "flaw")
"""Columns of a mini world that say what a clip is made of; the index takes nothing from them."""

CLIP_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")  # a valid file name on any system, never a path
MAX_SIDE = 16384  # pixels; UltraVideo's widest frame has 7680
_EXPECTED = "UltraVideo's CSV, or the index that luve index makes of your own clips"
MAX_FPS = 240


class RowError(ValueError):
    """What is wrong with a row: "what: details"."""


@dataclass(frozen=True)
class ClipEntry:
    """One clip.

    Attributes:
        clip_id: names the clip, in an index once; a valid file name (`CLIP_ID`).
        path: file of the clip.
        url: id of its source video; clips of one source are in the same split.
        fps: frames per second, on average; 0 for a still.
        total_frames: number of frames, by the index; 1 for a still.
        width: pixels, as shown.
        height: pixels, as shown.
        captions: captions by column name: UltraVideo's `CAPTIONS`, or "caption" for clips of one's own.
        still: whether it is a picture.
        uneven: whether its frame rate varies; UltraVideo's CSV does not say.
        duration: seconds; None where the index does not say, and for a still.
        matte: colour behind the transparent parts of a still; None refuses such a still when it is read.
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
    matte: str | None = None


@dataclass(frozen=True)
class Limits:
    """Which clips to take, by the index. It is no part of a stored latent's address.

    Attributes:
        min_frames: take clips of at least this many frames; stills are taken whatever it says.
        min_height: take clips at least this high as they are shown, pixels.
        min_width: take clips at least this wide as they are shown, pixels.
        fps_range: take clips with a frame rate within, both ends included; null takes all. Stills have none and are
            taken.
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
        if entry.total_frames < self.min_frames and not entry.still:
            raise RowError(f"too few frames: {entry.total_frames}, at least {self.min_frames} wanted")
        if entry.height < self.min_height or entry.width < self.min_width:
            wanted = f"{self.min_width}x{self.min_height}"
            raise RowError(f"frame too small: {entry.width}x{entry.height}, at least {wanted} wanted")
        low, high = self.fps_range or (0, math.inf)
        if not low <= entry.fps <= high and not entry.still:
            raise RowError(f"frame rate not wanted: {entry.fps:g}, {low:g} to {high:g} wanted")


class VideoIndex:
    """The usable clips of an index, and why the others are not.

    Args:
        entries: the clips, in the index's order.
        dropped: (clip_id, reason) of every row left out; a reason is "what: details".
        source: the file, for messages.
        splits: the split of each url, if given; None computes it from the url.
        own: whether `luve index` made it, with splits of which some may be empty.
    """

    def __init__(
        self,
        entries: Sequence[ClipEntry],
        dropped: Sequence[tuple[str, str]] = (),
        source: Path | None = None,
        splits: Mapping[str, Split] | None = None,
        own: bool = False,
    ) -> None:
        self.entries, self.dropped, self.source, self.own = list(entries), list(dropped), source, own
        self.splits = None if splits is None else dict(splits)
        self.left_out: set[tuple[str, str]] = set()
        """Those of `dropped` that `luve index` left out, and told."""

    @classmethod
    def open(cls, path: str | Path, folder: str | Path | None = None, keep: Limits = Limits()) -> VideoIndex:
        """Open UltraVideo's CSV or an index that `luve index` wrote.

        Args:
            path: the file.
            folder: folder of the clips; default `clips/` beside a CSV, else the file's own folder, to which a Parquet
                index's paths are relative.
            keep: which clips to take.

        Raises:
            FileNotFoundError: no such file or folder.
            VideoIndexError: no index, or no usable row.
        """
        path, clips = Path(path), None if folder is None else Path(folder)
        if path.is_dir():
            raise VideoIndexError(
                f"{path}: a folder, not an index; make one: luve index {path} --output {path.name}.parquet"
            )
        if not path.is_file() or not is_parquet(path):
            return cls.from_csv(path, clips, keep)
        if clips is not None and not clips.is_dir():
            raise FileNotFoundError(f"{clips}: no such folder of clips")
        from luve_lightning.data.index_file import open_own_index  # which needs this module

        return open_own_index(path, clips, keep)

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
            what = "index" if path.suffix == ".parquet" else "CSV"
            raise FileNotFoundError(f"{path}: no such {what}{_how_to_get(path)}")
        beside = path.parent / "clips"
        clips = Path(folder) if folder is not None else beside if beside.is_dir() else path.parent
        if not clips.is_dir():
            raise FileNotFoundError(f"{clips}: no such folder of clips")
        index, urls = cls([], source=path), set[str]()
        try:
            index._read(path, clips, keep, urls)
        except UnicodeDecodeError as error:
            raise VideoIndexError(
                f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); expected {_EXPECTED}"
            ) from None
        index.splits = read_splits(path.with_name("splits.json"), {entry.url for entry in index.entries}, urls)
        return index.checked(clips)

    def checked(self, folder: Path) -> VideoIndex:
        """The index itself; VideoIndexError, which names the folder of its clips, when it has none."""
        if not self.entries:
            counts = ", ".join(f"{count} {what}" for what, count in self._counts()) or "it has no rows"
            first = f"; first {self.dropped[0][1]}" if self.own and self.dropped else ""
            raise VideoIndexError(f"{self.source}: no clip can be used: {counts} (folder {folder}){first}")
        return self

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
                    raise RowError("duplicate clip_id: an earlier row has it")
                seen.add(clip_id)
                if entry.path.name not in files:
                    other = f" ({stems[clip_id]} is there)" if clip_id in stems else ""
                    raise RowError(f"file missing: {entry.path}{other}")
                keep.check(entry)
                self.entries.append(entry)
            except RowError as error:
                self.dropped.append((clip_id, str(error)))

    def __len__(self) -> int:
        return len(self.entries)

    def split(self, name: Split, fractions: tuple[float, float, float] = FRACTIONS) -> list[ClipEntry]:
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

    def summary(self, again: bool = True) -> str:
        """What the index holds and what was dropped, as lines of text.

        Args:
            again: also why `luve index` left rows out, which it told when it made the index.
        """
        urls = len({entry.url for entry in self.entries})
        kept = f"{amount(len(self.entries), 'clip')} of {amount(urls, 'source video')}"
        lines = [f"{self.source or 'index'}: {kept}, {amount(len(self.dropped), 'row')} dropped"]
        dropped = [pair for pair in self.dropped if again or pair not in self.left_out]
        if len(dropped) < len(self.dropped):
            count = len(self.dropped) - len(dropped)
            lines.append(f"  {count:6d}  left out by luve index (luve index --show {self.source} says why)")
        for what, count in Counter(_what(reason) for _, reason in dropped).most_common():
            clip_id, reason = next(pair for pair in dropped if _what(pair[1]) == what)
            details = reason.partition(": ")[2]
            first = " ".join(filter(None, dict.fromkeys((clip_id, details))))
            lines.append(f"  {count:6d}  {what} (first: {first})")
        return "\n".join(lines)

    def _counts(self) -> list[tuple[str, int]]:
        return Counter(_what(reason) for _, reason in self.dropped).most_common()


def is_parquet(path: Path) -> bool:
    """Whether a file is Parquet, by its first bytes."""
    with path.open("rb") as stream:
        return stream.read(4) == b"PAR1"


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
    unknown = [name for name in header if name not in (*COLUMNS, *PARTS)]
    repeated = sorted({name for name in header if header.count(name) > 1})
    if missing or repeated:
        parts = [f"missing columns: {', '.join(missing)}"] if missing else []
        parts += [f"columns given twice: {', '.join(repeated)}"] if repeated else []
        if unknown:
            parts.append(f"unknown columns: {', '.join(_with_guess(name, missing) for name in unknown)}")
        if header and len(missing) == len(COLUMNS):
            raise VideoIndexError(f"{csv_path}: none of UltraVideo's columns is there; expected {_EXPECTED}")
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
        raise RowError("malformed row: too few or too many fields")
    if not CLIP_ID.fullmatch(clip_id):
        raise RowError(f"bad clip_id: {clip_id!r}, letters, digits, '.', '_' and '-' expected")
    if not url:
        raise RowError("no url")
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
        raise RowError(f"bad {column}: {text!r} is not a number") from None
    if not low <= value <= high or math.isinf(value):
        raise RowError(f"bad {column}: {text}, {low:g} to {high:g} expected")
    return value


def _whole(row: dict[str, str], column: str, low: float, high: float) -> int:
    value = _number(row, column, low, high)
    if value != int(value):
        raise RowError(f"bad {column}: {row[column]}, a whole number expected")
    return int(value)
