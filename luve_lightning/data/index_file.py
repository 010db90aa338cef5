"""The Parquet index that `luve index` writes: one row a file, with what was found in it or why it is left out."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from luve_lightning.data.hashes import FileHashes
from luve_lightning.data.index_probes import Probe
from luve_lightning.data.index_sources import SourceFile
from luve_lightning.data.splits import Split, VideoIndexError, place_sources
from luve_lightning.data.video_index import CAPTION, CAPTIONS, ClipEntry, Limits, RowError, VideoIndex
from luve_lightning.files import replacing, text_digest

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


# Rows --------------------------------------------------------------------------------------------------------

ProbedFile = tuple[Probe, os.stat_result | None]
"""What `find_probes` says of a file."""

_SCENE = re.compile(r"[-_. ]*scene[-_. ]*\d+$", re.IGNORECASE)  # PySceneDetect's names: clips of one video
_NO_SIGNS = re.compile(r"[^A-Za-z0-9]+")
_SLUG, _HASH = 40, 12  # characters of a clip's id


def make_rows(
    files: Sequence[SourceFile],
    found: Mapping[Path, ProbedFile],
    hashes: FileHashes,
    by: str | None = None,
    fixed: Callable[[Sequence[str]], Mapping[str, Split]] = lambda sources: {},
    advance: Callable[[int], None] = lambda count: None,
) -> list[IndexRow]:
    """The rows of an index, in the order of the files: a clip's id, its source, its split, or why it is left out.

    Args:
        files: what the sources name.
        found: what the files hold, where they are not left out already.
        hashes: of files of equal size, to find those of equal bytes.
        by: "file" or "folder" makes each file or folder a source of its own; None takes what tables say, else files.
        fixed: splits that are given, of these sources.
        advance: called with the number of files that were compared.

    Raises:
        VideoIndexError: a table puts one source into two splits.
    """
    reasons = {file.path: file.reason or found[file.path][0].reason for file in files}
    usable = [file for file in files if not reasons[file.path]]
    reasons |= _duplicates([(file.path, found[file.path][1]) for file in usable], hashes, advance)
    usable = [file for file in usable if not reasons[file.path]]
    sources = {file.path: _source(file, by) for file in usable}
    given = _given_splits(usable, sources)
    split_of = place_sources(sources.values(), {**given, **fixed(list(dict.fromkeys(sources.values())))})
    ids, taken = clip_ids(usable), {file.path for file in usable}
    rows = []
    for file in files:
        if file.path not in taken:
            rows.append(IndexRow(file.path, reason=reasons[file.path]))
            continue
        probe, source = found[file.path][0], sources[file.path]
        entry = ClipEntry(
            clip_id=ids[file.path],
            path=file.path,
            url=source,
            fps=probe.fps,
            total_frames=probe.frames,
            width=probe.width,
            height=probe.height,
            captions={CAPTION: "", **file.captions},
            still=probe.still,
            uneven=probe.uneven,
            duration=probe.duration,
        )
        rows.append(IndexRow(file.path, entry, split_of[source], note=file.note or probe.note))
    return rows


def clip_ids(files: Iterable[SourceFile]) -> dict[Path, str]:
    """An id for each file, unique and a valid file name: some letters of its name, and a hash.

    The hash is of the path from the source's folder, so that an id stays when the folder is moved; of two that are
    equal in this, the second's takes the folder's name in, too, or its whole path.
    """
    ids: dict[Path, str] = {}
    used: set[str] = set()
    for file in files:
        letters = unicodedata.normalize("NFKD", file.path.stem).encode("ascii", "ignore").decode()
        slug = _NO_SIGNS.sub("-", letters)[:_SLUG].strip("-")
        names = (file.name, f"{file.root}/{file.name}", str(file.path))
        hashed = (text_digest(unicodedata.normalize("NFC", name))[:_HASH] for name in names)
        choices = [file.clip_id, *("-".join(filter(None, (slug, end))) for end in hashed)]
        ids[file.path] = next(choice for choice in choices if choice and choice not in used)
        used.add(ids[file.path])
    return ids


def _source(file: SourceFile, by: str | None) -> str:
    if file.source and by is None:
        return file.source
    whole = Path(file.root, file.name)
    return (whole.parent if by == "folder" else whole.with_name(_SCENE.sub("", whole.stem) or whole.name)).as_posix()


def _given_splits(files: Iterable[SourceFile], sources: Mapping[Path, str]) -> dict[str, Split]:
    given: dict[str, Split] = {}
    for file in files:
        if file.split is not None and given.setdefault(sources[file.path], file.split) != file.split:
            raise VideoIndexError(
                f"{file.path}: split: its source {sources[file.path]!r} is in {given[sources[file.path]]} and in "
                f"{file.split}: clips of one source video would leak from one to the other"
            )
    return given


def _duplicates(
    files: Sequence[tuple[Path, os.stat_result | None]], hashes: FileHashes, advance: Callable[[int], None]
) -> dict[Path, str]:
    """Why files are left out that are another one's link or copy: on two sides of a split they would leak."""
    reasons, same = dict[Path, str](), dict[tuple[int, int], Path]()
    by_size: dict[int, list[Path]] = {}
    for path, facts in files:
        assert facts is not None  # only a file that cannot be opened has none
        first = same.setdefault((facts.st_dev, facts.st_ino), path)
        if first != path:
            reasons[path] = f"link to another file: {path.name} is {first}"
        else:
            by_size.setdefault(facts.st_size, []).append(path)
    for paths in by_size.values():
        known: dict[str, Path] = {}
        for path in paths if len(paths) > 1 else ():
            with suppress(OSError):  # whoever reads it finds out
                first = known.setdefault(hashes.digest(path), path)
                if first != path:
                    reasons[path] = f"copy of another file: {path.name} is equal to {first}"
        advance(len(paths))
    return reasons


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
    values |= {"uneven": entry.uneven, "duration": entry.duration}
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
