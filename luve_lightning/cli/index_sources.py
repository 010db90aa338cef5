"""What `luve index` makes an index from: folders of clips and stills, tables that name them, UltraVideo's CSV."""

from __future__ import annotations

import csv
import json
import os
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from luve_lightning.cli.index_probes import PROBES
from luve_lightning.data.splits import SPLITS, Split, VideoIndexError
from luve_lightning.data.video_index import CAPTION, CAPTIONS, CLIP_ID, VideoIndex, is_parquet

TABLES = ("metadata.csv", "metadata.jsonl")
"""Tables that are looked for in every folder."""

_PATHS = ("file_name", "video", "image", "path")
_TEXTS = ("text", CAPTION, "prompt")
_SOURCES = ("source", "url")
_SPLIT_NAMES: dict[str, Split] = {**{name: name for name in SPLITS}, "validation": "val"}
_CAPTION_BYTES = 1 << 20  # no caption is longer; a text of another kind is not read whole
# Files that stand beside clips and are none, by their suffixes. Everything else is looked at: FFmpeg says what it is.
_NO_CLIPS = frozenset({
    ".7z", ".ass", ".bin", ".cfg", ".ckpt", ".csv", ".db", ".doc", ".docx", ".exe", ".gguf", ".gz", ".html", ".ini",
    ".ipynb", ".js", ".json", ".jsonl", ".lnk", ".log", ".md", ".nfo", ".npy", ".npz", ".parquet", ".pdf", ".pkl",
    ".pt", ".pth", ".py", ".rar", ".safetensors", ".sh", ".srt", ".tar", ".tmp", ".toml", ".torrent", ".tsv", ".txt",
    ".url", ".vtt", ".xml", ".xmp", ".yaml", ".yml", ".zip",
})  # fmt: skip


@dataclass(frozen=True)
class SourceFile:
    """A file that a source names, before it is looked into.

    Attributes:
        path: the file.
        name: the same from the source's folder, with slashes.
        root: name of that folder.
        captions: captions by column.
        source: id of its source video where a table says it, for splits.
        split: where it belongs, where a table says it.
        clip_id: its id, where a table says it.
        reason: why it is left out, "what: details"; empty for what may be a clip.
        note: what is worth knowing when it is taken, "what: details".
    """

    path: Path
    name: str
    root: str
    captions: dict[str, str] = field(default_factory=dict, hash=False)
    source: str = ""
    split: Split | None = None
    clip_id: str = ""
    reason: str = ""
    note: str = ""


def find_files(sources: Iterable[Path], column: str | None = None, skip: Path | None = None) -> list[SourceFile]:
    """The files that sources name, in the order of the sources, within a folder by name.

    A file that several name comes once, with the first caption, source and split that any of them gives it.

    Args:
        sources: folders, tables (.csv, .jsonl, .json, Parquet), UltraVideo's CSV, or single clips and stills.
        column: column of tables that says the source video; None takes `source` or `url` where there is one.
        skip: a file that is no clip: the index that will be written.

    Raises:
        FileNotFoundError: no such source.
        VideoIndexError: a table that cannot be used; one line that names it.
    """
    found: dict[Path, SourceFile] = {}
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"{source}: no such file or folder")
        for file in _files_of(source, column):
            if skip is None or file.path != skip:
                found[file.path] = _together(found[file.path], file) if file.path in found else file
    return list(found.values())


def _together(first: SourceFile, other: SourceFile) -> SourceFile:
    if first.reason or other.reason:
        return other if first.reason else first
    return replace(
        first,
        captions={**other.captions, **{name: text for name, text in first.captions.items() if text}},
        source=first.source or other.source,
        split=first.split or other.split,
        clip_id=first.clip_id or other.clip_id,
        note=first.note or other.note,
    )


def _files_of(source: Path, column: str | None) -> Iterator[SourceFile]:
    if source.is_dir():
        return _in_folder(source.resolve(), column)
    path = source.parent.resolve() / source.name
    if path.suffix.lower() in (".csv", ".jsonl", ".json", ".parquet") or (path.is_file() and is_parquet(path)):
        return iter(_Table(path, column).files())
    return iter([_Folder(path.parent).file(path.name)])


# Folders -----------------------------------------------------------------------------------------------------


class _Folder:
    """One folder's entries, listed once: names are compared with accents composed, as file systems differ in them.

    Args:
        path: the folder.
        root: the source that it is in; default the folder itself.
    """

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self.path, self.root = path, root or path
        self._inside = "" if self.root == path else f"{path.relative_to(self.root).as_posix()}/"
        with os.scandir(path) as found:
            items = sorted(found, key=lambda item: item.name)
        self.folders = [item.name for item in items if _is_folder(item)]
        self.files = dict.fromkeys(item.name for item in items if not _is_folder(item))
        self._by_name = {unicodedata.normalize("NFC", name).lower(): name for name in reversed(self.files)}

    def named(self, name: str) -> str | None:
        """The file of this name; letters may differ in case and accents in how they are written."""
        return name if name in self.files else self._by_name.get(unicodedata.normalize("NFC", name).lower())

    def caption_name(self, name: str) -> str | None:
        """The text beside a file: `clip.txt`, else `clip.mp4.txt`."""
        stem = name.rpartition(".")[0] or name
        return self.named(f"{stem}.txt") or self.named(f"{name}.txt")

    def file(self, name: str) -> SourceFile:
        """A file of the folder with the caption beside it."""
        file = SourceFile(self.path / name, f"{self._inside}{name}", self.root.name)
        if any(map(_is_no_utf8, (str(self.path), name))):
            return replace(file, reason="name not in UTF-8: rename it")
        if name.startswith("."):
            return replace(file, reason=f"hidden: {name}")
        if Path(name).suffix.lower() in _NO_CLIPS:
            return replace(file, reason=f"no clip or still by its name: {name}")
        if (text := self.caption_name(name)) is None:
            return file
        caption, problem = _read_caption(self.path / text)
        return replace(file, captions={} if problem else {CAPTION: caption}, note=problem)


def _is_no_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # Python keeps other bytes as surrogates
        return True
    return False


def _is_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _in_folder(root: Path, column: str | None) -> Iterator[SourceFile]:
    """The files of a folder and its subfolders, folder by folder; each folder once, however many links lead to it."""
    waiting, seen = [root], set[Path]()
    while waiting:
        path = waiting.pop()
        as_file = SourceFile(path, path.relative_to(root).as_posix(), root.name)
        if path != root and path.name.startswith("."):
            yield replace(as_file, reason=f"hidden folder: {path.name}")
            continue
        if (real := path.resolve()) in seen:
            yield replace(as_file, reason=f"link to a folder that is there already: {path.name}")
            continue
        seen.add(real)
        try:
            folder = _Folder(path, root)
        except OSError as error:
            yield replace(as_file, reason=f"folder cannot be opened: {error.strerror}")
            continue
        waiting += [path / name for name in reversed(folder.folders)]
        yield from _of_one_folder(folder, column)


def _of_one_folder(folder: _Folder, column: str | None) -> Iterator[SourceFile]:
    tables = [name for name in TABLES if name in folder.files]
    by_table: dict[Path, SourceFile] = {}
    for name in tables:
        for file in _Table(folder.path / name, column, folder.root).files():
            by_table[file.path] = _together(by_table[file.path], file) if file.path in by_table else file
    texts = dict.fromkeys(name for name in folder.files if name.lower().endswith(".txt"))
    captions: set[str | None] = set()
    for name in folder.files:
        if name in tables or name == PROBES or name in texts:
            continue
        file = folder.file(name)
        captions.add(None if file.reason else folder.caption_name(name))
        yield _together(by_table.pop(file.path), file) if file.path in by_table else file
    yield from by_table.values()  # in subfolders or missing
    for name in texts:
        if name not in captions:
            yield replace(folder.file(name), reason=f"text without a clip: {name}")


def _read_caption(path: Path) -> tuple[str, str]:
    """The caption in a text file, and what is wrong with it."""
    try:
        with path.open("rb") as stream:
            content = stream.read(_CAPTION_BYTES + 1)
        if len(content) > _CAPTION_BYTES:
            return "", f"caption not read: {path.name} is longer than {_CAPTION_BYTES >> 20} MiB"
        wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        return _clean(content.decode("utf-16" if wide else "utf-8-sig")), ""
    except OSError as error:
        return "", f"caption not read: {path.name}: {error.strerror}"
    except UnicodeDecodeError:
        return "", f"caption not read: {path.name} is not UTF-8 text"


def _clean(text: str) -> str:
    """A caption without what no text file can hold, and with one kind of line end."""
    whole = text.replace("\0", "").encode(errors="replace").decode()
    return "\n".join(line.rstrip() for line in whole.splitlines()).strip()


# Tables ------------------------------------------------------------------------------------------------------


class _Table:
    """A table with a row a file.

    Args:
        path: .csv, .jsonl or .json, else Parquet.
        column: column that says the source video; None takes `source` or `url` where there is one.
        root: folder from which files are named; default the table's.
    """

    def __init__(self, path: Path, column: str | None, root: Path | None = None) -> None:
        self.path, self.root = path, root or path.parent
        self.column, self._folders = column, dict[Path, _Folder | None]()

    def files(self) -> list[SourceFile]:
        """The files of all rows.

        Raises:
            VideoIndexError: not such a table.
        """
        rows, columns = self._read()
        if not any(name in columns for name in _PATHS) and "clip_id" in columns and self.path.suffix.lower() == ".csv":
            return self._ultravideo()
        paths = [name for name in _PATHS if name in columns]
        if not paths:
            known = ", ".join(map(repr, columns)) or "none"
            raise VideoIndexError(f"{self.path}: expected a column {_or(_PATHS)} with the files, got {known}")
        sources = [self.column] if self.column else [name for name in _SOURCES if name in columns][:1]
        if self.column and self.column not in columns:
            raise VideoIndexError(f"{self.path}: source: no column {self.column!r}, it has {', '.join(columns)}")
        used = {*_PATHS, *_TEXTS, *CAPTIONS, *_SOURCES, *sources, "split", "clip_id"}
        if unknown := [name for name in columns if name not in used and not self._is_index(columns)]:
            warnings.warn(f"{self.path}: columns not used: {', '.join(unknown)}", stacklevel=2)
        return [self._file(number, row, paths, sources) for number, row in enumerate(rows, 1)]

    @staticmethod
    def _is_index(columns: Sequence[str]) -> bool:
        return {"reason", "note", "uneven"} <= set(columns)

    def _file(self, number: int, row: Mapping[str, Any], paths: Sequence[str], sources: Sequence[str]) -> SourceFile:
        name = next((str(row[column]) for column in paths if row.get(column)), "")
        if not name:
            where = SourceFile(self.path, self.path.name, self.root.name)
            return replace(
                where,
                path=self.path.with_name(f"{self.path.name}:{number}"),
                reason=f"row that names no file: number {number}",
            )
        path = self._place(name.replace("\0", "?").encode(errors="replace").decode())
        inside = path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path.name
        captions = {column: _text(row[column]) for column in CAPTIONS if row.get(column) is not None}
        if (text := next((_text(row[column]) for column in _TEXTS if row.get(column)), None)) is not None:
            captions[CAPTION] = text
        clip_id = str(row.get("clip_id") or "")
        return SourceFile(
            path,
            inside,
            self.root.name,
            captions,
            source=next((str(row[column]) for column in sources if row.get(column)), ""),
            split=self._split(number, row.get("split")),
            clip_id=clip_id if CLIP_ID.fullmatch(clip_id) else "",
        )

    def _split(self, number: int, value: Any) -> Split | None:
        if value is None or not str(value).strip():
            return None
        split = _SPLIT_NAMES.get(str(value).strip().lower())
        if split is None:
            raise VideoIndexError(f"{self.path}: row {number}: split: expected {_or(SPLITS)}, got {value!r}")
        return split

    def _place(self, name: str) -> Path:
        """The file of a name relative to the table, however its accents and slashes are written."""
        path = Path(os.path.normpath(self.path.parent / name))
        if path.parent not in self._folders:
            try:
                self._folders[path.parent] = _Folder(path.parent)
            except (OSError, ValueError):
                self._folders[path.parent] = None
        folder = self._folders[path.parent]
        found = None if folder is None else folder.named(path.name)
        if found is None and "\\" in name:
            return self._place(name.replace("\\", "/"))
        return path if found is None else path.parent / found

    def _ultravideo(self) -> list[SourceFile]:
        index = VideoIndex.from_csv(self.path)
        split_of = {entry.url: split for split in SPLITS for entry in index.split(split)}
        taken = [
            SourceFile(
                entry.path.parent.resolve() / entry.path.name,
                entry.path.name,
                self.root.name,
                {**entry.captions, CAPTION: entry.captions[CAPTIONS[-1]]},
                entry.url,
                split_of[entry.url],
                entry.clip_id,
            )
            for entry in index.entries
        ]
        base = index.entries[0].path.parent.resolve()
        dropped = [
            SourceFile(base / f"{clip_id or f'{self.path.name} {number}'}.mp4", clip_id, self.root.name, reason=reason)
            for number, (clip_id, reason) in enumerate(index.dropped, 1)
        ]
        return taken + dropped

    def _read(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The rows, and the columns that any of them has."""
        try:
            if is_parquet(self.path):
                table = pq.read_table(self.path)
                return table.to_pylist(), table.column_names
            if self.path.suffix.lower() == ".csv":
                return self._read_csv()
            rows = self._read_json()
        except (pa.ArrowException, OSError) as error:
            raise VideoIndexError(f"{self.path}: cannot be read: {' '.join(str(error).split())}") from None
        except UnicodeDecodeError as error:
            raise VideoIndexError(f"{self.path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        return rows, list(dict.fromkeys(name for row in rows for name in row))

    def _read_csv(self) -> tuple[list[dict[str, Any]], list[str]]:
        with self.path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            try:
                header = next(reader, [])
                # A row with too few or too many fields names no file.
                rows = [dict(zip(header, f, strict=True)) if len(f) == len(header) else {} for f in reader if f]
            except csv.Error as error:
                raise VideoIndexError(f"{self.path}: line {reader.line_num}: not CSV ({error})") from None
        if len(header) == 1 and (sign := next((sign for sign in ";\t|" if sign in header[0]), None)):
            raise VideoIndexError(f"{self.path}: its columns are separated by {sign!r}, expected commas")
        return rows, header

    def _read_json(self) -> list[dict[str, Any]]:
        text = self.path.read_text(encoding="utf-8-sig")
        number, lines = 0, [text] if self.path.suffix.lower() == ".json" else text.split("\n")
        rows: list[Any] = []
        try:
            for number, line in enumerate(lines, 1):  # noqa: B007  # for the message
                rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            where = f" line {number}:" if len(lines) > 1 else ""
            raise VideoIndexError(f"{self.path}:{where} not JSON ({error})") from None
        if len(rows) == 1 and isinstance(rows[0], list):  # the rows as one list
            rows = rows[0]
        if not all(isinstance(row, dict) for row in rows):
            raise VideoIndexError(f"{self.path}: expected an object for each file")
        return rows


def _text(value: Any) -> str:
    """A caption; of several, the first."""
    return _text(value[0]) if isinstance(value, list) and value else _clean(str(value))


def _or(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
