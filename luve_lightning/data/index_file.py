"""The Parquet index of `luve index`: one row a file, with what was found in it or why it is left out; its summary."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from luve_lightning.data.splits import SPLITS, Split, VideoIndexError
from luve_lightning.data.video_index import CAPTION, CAPTIONS, ClipEntry, Limits, RowError, VideoIndex
from luve_lightning.files import replacing

_FORM = b"luve_index"  # key of the version in the file's own metadata
_VERSION = b"1"

_FIELDS: dict[str, pa.DataType] = {
    "clip_id": pa.string(),
    "path": pa.string(),
    "source": pa.string(),
    "split": pa.string(),
    "still": pa.bool_(),
    "width": pa.int32(),
    "height": pa.int32(),
    "frames": pa.int64(),
    "fps": pa.float64(),
    "uneven": pa.bool_(),
    "duration": pa.float64(),
    "matte": pa.string(),
    "reason": pa.string(),
    "note": pa.string(),
}


@dataclass(frozen=True)
class IndexRow:
    """One row: a clip, or a file that is left out.

    Attributes:
        path: the file; absolute, without links in its folder, where it is written.
        entry: the clip; None where it is left out.
        split: where the clip belongs.
        reason: why it is left out, "what: details"; empty for a clip.
        note: what is worth knowing about a clip that is taken, "what: details".
    """

    path: Path
    entry: ClipEntry | None = None
    split: Split = "train"
    reason: str = ""
    note: str = ""


def write_index(path: Path, rows: Sequence[IndexRow]) -> None:
    """Write an index atomically.

    Files below the index's folder are written by their path from there, so that the folder can be moved.

    Raises:
        OSError: it cannot be written; an older index is unchanged.
    """
    base = path.parent.resolve()
    entries = [row.entry for row in rows if row.entry is not None]
    texts = [CAPTION, *(name for name in CAPTIONS if any(name in entry.captions for entry in entries))]
    values = [_values(row, base, texts) for row in rows]
    schema = pa.schema([*_FIELDS.items(), *((name, pa.string()) for name in texts)], metadata={_FORM: _VERSION})
    table = pa.Table.from_pylist(values, schema=schema)
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _values(row: IndexRow, base: Path, texts: Sequence[str]) -> dict[str, Any]:
    where = row.path.relative_to(base) if row.path.is_relative_to(base) else row.path
    values: dict[str, Any] = {"path": _utf8(where), "reason": row.reason or None, "note": row.note or None}
    if (entry := row.entry) is None:
        return values
    values |= {"clip_id": entry.clip_id, "source": entry.url, "split": row.split, "still": entry.still}
    values |= {"width": entry.width, "height": entry.height, "frames": entry.total_frames, "fps": entry.fps}
    values |= {"uneven": entry.uneven, "duration": entry.duration, "matte": entry.matte}
    return values | {name: entry.captions.get(name) for name in texts}


def _utf8(path: Path) -> str:
    """A path as text; of a name in another encoding, which is left out, what can be shown."""
    return os.fsencode(path.as_posix()).decode(errors="replace")


def read_rows(path: Path, folder: Path | None = None) -> list[IndexRow]:
    """The rows of an index.

    Args:
        path: the file.
        folder: what relative paths are relative to; default the index's folder.

    Raises:
        VideoIndexError: it is damaged, or no index.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise VideoIndexError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    version = (table.schema.metadata or {}).get(_FORM)
    if version is None:
        raise VideoIndexError(
            f"{path}: a Parquet file, but no index; make one: luve index {path.name} --output INDEX.parquet"
        )
    missing = [name for name in _FIELDS if name not in table.column_names]
    if version != _VERSION or missing:
        what = f"it lacks {', '.join(missing)}" if missing else f"version {version.decode(errors='replace')}"
        raise VideoIndexError(f"{path}: an index of another version ({what}); make it again with luve index")
    base = path.parent if folder is None else folder
    texts = [name for name in table.column_names if name == CAPTION or name in CAPTIONS]
    return [_row(values, base, texts) for values in table.to_pylist()]


def _row(values: Mapping[str, Any], base: Path, texts: Sequence[str]) -> IndexRow:
    path, reason = base / values["path"], values["reason"] or ""
    if reason:
        return IndexRow(path, reason=reason)
    entry = ClipEntry(
        clip_id=values["clip_id"],
        path=path,
        url=values["source"],
        fps=values["fps"],
        total_frames=values["frames"],
        width=values["width"],
        height=values["height"],
        captions={name: values[name] for name in texts if values[name] is not None},
        still=values["still"],
        uneven=values["uneven"],
        duration=values["duration"],
        matte=values["matte"],
    )
    return IndexRow(path, entry, values["split"], note=values["note"] or "")


def open_own_index(path: Path, folder: Path | None, keep: Limits) -> VideoIndex:
    """An index of `luve index` with the clips that are still there.

    Args:
        path: the file.
        folder: what relative paths are relative to; default the index's folder.
        keep: which clips to take.

    Raises:
        VideoIndexError: no such index, or no usable clip in it.
    """
    index, there = VideoIndex([], source=path, splits={}, own=True), _Folders()
    assert index.splits is not None
    for row in read_rows(path, folder):
        if row.entry is None:
            index.dropped.append((row.path.name, row.reason))
            index.left_out.add((row.path.name, row.reason))
            continue
        index.splits[row.entry.url] = row.split
        try:
            if row.path.name not in there.names(row.path.parent):
                raise RowError(f"file missing: {row.path}; run luve index again")
            keep.check(row.entry)
            index.entries.append(row.entry)
        except RowError as error:
            index.dropped.append((row.entry.clip_id, str(error)))
    return index.checked(folder or path.parent)


@dataclass
class _Folders:
    """The names in folders, each listed once: asking for each of 100,000 files takes minutes on a network disk."""

    known: dict[Path, frozenset[str]] = field(default_factory=dict)

    def names(self, folder: Path) -> frozenset[str]:
        if folder not in self.known:
            try:
                with os.scandir(folder) as found:
                    self.known[folder] = frozenset(item.name for item in found)
            except OSError:
                self.known[folder] = frozenset()
        return self.known[folder]


# Summary -----------------------------------------------------------------------------------------------------

_SHOWN = 6  # sizes, rates and the like in one line


def index_lines(rows: Sequence[IndexRow]) -> list[str]:
    """What an index holds, in lines of text."""
    entries = [row.entry for row in rows if row.entry is not None]
    clips, stills = [e for e in entries if not e.still], [e for e in entries if e.still]
    seconds = sum(e.duration or (e.total_frames / e.fps if e.fps else 0) for e in clips)
    uneven = sum(e.uneven for e in clips)
    lines = [f"  clips          {len(clips)}, {_time(seconds)}"] if clips else ["  clips          none"]
    lines += [f"  stills         {len(stills)}"] if stills else []
    lines += [f"  sizes          {_most(f'{e.width}x{e.height}' for e in entries)}"] if entries else []
    if clips:
        varying = f"; {uneven} of them varying" if uneven else ""
        rates = _most(f"{e.fps:.4g}" if e.fps else "not said" for e in clips)
        lines += [f"  frames/s       {rates}{varying}", f"  frames         {_spread([e.total_frames for e in clips])}"]
    lines += _caption_lines(rows) + _split_lines(rows)
    lines += counted("worth knowing", [(row, row.note) for row in rows if row.note])
    return lines + counted("left out", [(row, row.reason) for row in rows if row.entry is None])


def _caption_lines(rows: Sequence[IndexRow]) -> list[str]:
    texts = [(row.path.name, row.entry.captions.get(CAPTION)) for row in rows if row.entry is not None]
    if all(text is None for _, text in texts):  # UltraVideo's CSV, with columns of its own
        return []
    lengths = [len(text) for _, text in texts if text]
    without = [name for name, text in texts if not text]
    lines = [f"  captions       {len(lengths)}" + (f", of {_spread(lengths)} characters" if lengths else "")]
    return lines + ([f"  no caption     {len(without)} (first: {without[0]})"] if without else [])


def _split_lines(rows: Sequence[IndexRow]) -> list[str]:
    of: dict[Split, list[str]] = {split: [] for split in SPLITS}
    for row in rows:
        if row.entry is not None:
            of[row.split].append(row.entry.url)
    lines = [
        f"  {split:<14} {len(urls)} of {len(set(urls))} source{'s' * (len(set(urls)) != 1)}"
        if urls
        else f"  {split:<14} none"
        for split, urls in of.items()
    ]
    if not of["val"] and of["train"]:
        only = len({url for urls in of.values() for url in urls}) == 1
        why = f"there is one source only, {of['train'][0]}" if only else "the splits given say so"
        lines[1] += f": {why}; training goes on without validation"
    return lines


def counted(head: str, named: Sequence[tuple[IndexRow, str]]) -> list[str]:
    """How many rows there are of each kind, with the first's file and details."""
    kinds = Counter(text.partition(": ")[0] for _, text in named)
    lines = [f"  {head:<14} {len(named)}"] if named else []
    for kind, count in kinds.most_common():
        row, text = next((row, text) for row, text in named if text.partition(": ")[0] == kind)
        details = text.partition(": ")[2]
        first = details if row.path.name in details else ": ".join(filter(None, (row.path.name, details)))
        lines.append(f"    {count:6d}  {kind} (first: {first})")
    return lines


def _most(values: Iterable[str]) -> str:
    """The most frequent values with their number."""
    counts = Counter(values).most_common()
    more = f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
    return ", ".join(f"{count} of {value}" for value, count in counts[:_SHOWN]) + more


def _spread(numbers: Sequence[int]) -> str:
    """From the least to the most, and the middle one."""
    low, middle, high = min(numbers), sorted(numbers)[len(numbers) // 2], max(numbers)
    return str(low) if low == high else f"{low} to {high}, half of them {middle} or more"


def _time(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} hours"
        if seconds >= 3600
        else f"{seconds / 60:.1f} minutes"
        if seconds >= 60
        else f"{seconds:.1f} s"
    )
