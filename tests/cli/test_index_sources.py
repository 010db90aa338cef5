"""Files and captions as people have them."""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from luve_lightning.cli.index_sources import SourceFile, find_files
from luve_lightning.data.splits import VideoIndexError
from luve_lightning.data.video_index import CAPTIONS
from tests.helpers.small_world import write_index

NAMES = [
    "two words.mp4", "it's “quoted” \"twice\".mp4", "河边的老人.mov", "🎥 emoji 🎬.webm", "x" * 196 + ".mp4",
    "no suffix", "a.b.c.mkv", "semi;colon,comma.avi", "UPPER.MP4", "[brackets] & $signs #1.mp4", "-dash.mp4",
    "عربي.mp4",
]  # fmt: skip


def taken(files: Sequence[SourceFile]) -> dict[str, str | None]:
    """The captions of files that may be clips, by name."""
    return {file.name: file.captions.get("caption") for file in files if not file.reason}


def reasons(files: Sequence[SourceFile]) -> dict[str, str]:
    return {file.name: file.reason for file in files if file.reason}


def test_names_of_any_kind_in_subfolders(tmp_path: Path) -> None:
    (tmp_path / "sub folder" / "deeper").mkdir(parents=True)
    for name in NAMES:
        (tmp_path / name).touch()
        (tmp_path / "sub folder" / "deeper" / name).touch()
    files = find_files([tmp_path])
    assert not reasons(files)
    assert sorted(taken(files)) == sorted([*NAMES, *(f"sub folder/deeper/{name}" for name in NAMES)])
    assert all(file.path.is_file() and file.root == tmp_path.name for file in files)


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        (b"a river\n", "a river"),
        (b"", ""),
        (b" \r\n\t", ""),
        (b"\xef\xbb\xbfa river\r\nat dawn \r\n", "a river\nat dawn"),
        ("河边的老人，黄昏".encode(), "河边的老人，黄昏"),
        ("河边的老人".encode("utf-16"), "河边的老人"),
        (b"word " * 20_000, ("word " * 20_000).strip()),
        (b"nul\0byte", "nulbyte"),
    ],
)
def test_captions_beside_clips(content: bytes, caption: str, tmp_path: Path) -> None:
    for name in ("clip.mp4", "clip.png", "other.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "clip.txt").write_bytes(content)
    files = find_files([tmp_path])
    assert taken(files) == {"clip.mp4": caption, "clip.png": caption, "other.mp4": None}
    assert not reasons(files)
    assert not any(file.note for file in files)


def test_captions_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.mp4").touch()
    (tmp_path / "a.txt").write_bytes("河边的老人".encode("gbk"))
    (tmp_path / "b.mp4.txt").write_bytes(b"x" * (2 << 20))
    (tmp_path / "c.TXT").write_bytes(b"beside all the same")
    notes = {file.name: file.note for file in find_files([tmp_path])}
    assert notes == {
        "a.mp4": "caption not read: a.txt is not UTF-8 text",
        "b.mp4": "caption not read: b.mp4.txt is longer than 1 MiB",
        "c.mp4": "",
    }


def test_what_is_no_clip_is_named(tmp_path: Path) -> None:
    for name in ("a.mp4", "notes.md", "lonely.txt", ".DS_Store", "clip_probes.jsonl", "old.parquet"):
        (tmp_path / name).touch()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.mp4").touch()
    files = find_files([tmp_path], skip=tmp_path / "old.parquet")
    assert list(taken(files)) == ["a.mp4"]
    assert reasons(files) == {
        "notes.md": "no clip or still by its name: notes.md",
        "lonely.txt": "text without a clip: lonely.txt",
        ".DS_Store": "hidden: .DS_Store",
        ".cache": "hidden folder: .cache",
    }


def test_links_are_followed_once(tmp_path: Path) -> None:
    inside, elsewhere = tmp_path / "inside", tmp_path / "elsewhere"
    inside.mkdir()
    elsewhere.mkdir()
    (elsewhere / "a.mp4").touch()
    (inside / "to elsewhere").symlink_to(elsewhere)
    (inside / "to elsewhere too").symlink_to(elsewhere)
    (inside / "loop").symlink_to(inside)
    (inside / "self").symlink_to("self")
    (inside / "b.mp4").symlink_to(elsewhere / "a.mp4")
    files = find_files([inside])
    assert list(taken(files)) == ["b.mp4", "self", "to elsewhere/a.mp4"]
    assert reasons(files) == {
        "loop": "link to a folder that is there already: loop",
        "to elsewhere too": "link to a folder that is there already: to elsewhere too",
    }


def test_a_name_in_another_encoding(tmp_path: Path) -> None:
    try:
        with open(os.fsencode(tmp_path) + b"/\xe9t\xe9.mp4", "wb"):  # noqa: PTH123  # a name in bytes
            pass
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    assert list(reasons(find_files([tmp_path])).values()) == ["name not in UTF-8: rename it"]


ROWS: list[dict[str, Any]] = [
    {"file_name": "a.mp4", "text": 'a "river", at\ndawn', "split": "train", "url": "v1"},
    {"file_name": "sub/b.png", "text": "河", "split": "validation", "url": "v2"},
    {"file_name": "gone.mp4", "text": "x", "split": "", "url": "v2"},
]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [json.dumps(rows)] if path.suffix == ".json" else [*map(json.dumps, rows), ""]
        path.write_text("\r\n".join(lines), encoding="utf-8-sig")
    return path


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "table.json", "table.parquet"])
def test_tables(name: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for clip in ("a.mp4", "sub/b.png", "not in it.mp4"):
        (tmp_path / clip).touch()
    files = find_files([write_table(tmp_path / name, ROWS)])
    assert taken(files) == {"a.mp4": 'a "river", at\ndawn', "sub/b.png": "河", "gone.mp4": "x"}
    assert [(file.source, file.split) for file in files] == [("v1", "train"), ("v2", "val"), ("v2", None)]
    if name.startswith("metadata"):  # of a folder's other files, too
        assert taken(find_files([tmp_path])) == {**taken(files), "not in it.mp4": None}


@pytest.mark.parametrize("path", ["file_name", "video", "image", "path"])
@pytest.mark.parametrize("text", ["text", "caption", "prompt"])
def test_names_of_columns(path: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    assert taken(find_files([write_table(tmp_path / "t.csv", [{path: "a.mp4", text: "words"}])])) == {"a.mp4": "words"}


def test_a_column_of_sources(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", [{"path": "a.mp4", "film": "one"}, {"path": "b.mp4", "film": "two"}])
    assert [file.source for file in find_files([table], "film")] == ["one", "two"]
    with pytest.raises(VideoIndexError, match="source: no column 'actor', it has path, film"):
        find_files([table], "actor")
    with pytest.warns(UserWarning, match="columns not used: film"):
        find_files([table])


def test_captions_of_the_same_file_from_several_sources(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").touch()
    (tmp_path / "a.txt").write_text("beside")
    table = write_table(tmp_path / "t.csv", [{"path": "a.mp4", "text": "in the table"}, {"path": "b.mp4", "text": "b"}])
    assert taken(find_files([tmp_path, table])) == {"a.mp4": "beside", "b.mp4": "b"}
    assert taken(find_files([table, tmp_path])) == {"a.mp4": "in the table", "b.mp4": "b"}


def test_names_are_found_however_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    decomposed = unicodedata.normalize("NFD", "été.mp4")
    (tmp_path / "sub" / decomposed).touch()
    for name in ("sub/été.mp4", "sub\\ÉTÉ.MP4", str(tmp_path / "sub" / "été.mp4")):
        assert (
            find_files([write_table(tmp_path / "t.jsonl", [{"path": name}])])[0].path == tmp_path / "sub" / decomposed
        )


def test_rows_that_name_nothing_sensible(tmp_path: Path) -> None:
    rows = [{"path": "", "text": "x"}, {"path": None}, {"path": "a\0b.mp4"}, {"path": "\ud800.mp4", "text": "\ud800"}]
    files = find_files([write_table(tmp_path / "t.jsonl", rows)])
    assert [file.reason for file in files] == [
        "row that names no file: number 1",
        "row that names no file: number 2",
        "",
        "",
    ]
    assert not any(file.path.exists() for file in files)
    (tmp_path / "t.csv").write_text("path,text\na.mp4,one,two\nb.mp4\nc.mp4,three\n")
    files = find_files([tmp_path / "t.csv"])
    assert taken(files) == {"c.mp4": "three"}
    assert [bool(file.reason) for file in files] == [True, True, False]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.csv",
            b"name,text\na,b\n",
            "expected a column file_name, video, image or path with the files, got 'name', 'text'",
        ),
        ("t.csv", b"path;text\na;b\n", "its columns are separated by ';', expected commas"),
        ("t.csv", b'path,text\na,"b\n', "line 2: not CSV"),
        ("t.csv", b"path\n\xff\n", "not UTF-8 text"),
        ("t.csv", b"", "expected a column file_name, video, image or path with the files, got none"),
        ("t.jsonl", b'{"path": "a"}\n{"path"\n', "line 2: not JSON"),
        ("t.jsonl", b'{"path": "a"}\n[1]\n', "expected an object for each file"),
        ("t.json", b'{"path"', "not JSON"),
        ("t.json", b'["a"]', "expected an object for each file"),
        ("t.parquet", b"PAR1....", "cannot be read"),
        ("t.csv", b"path,split\na.mp4,holdout\n", "row 1: split: expected train, val or test, got 'holdout'"),
    ],
)
def test_tables_that_are_none(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VideoIndexError, match=message) as error:
        find_files([tmp_path / name])
    assert "\n" not in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_no_such_source(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        find_files([tmp_path / "nowhere"])


def test_ultravideos_csv(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    clips = [tmp_path / "clips" / f"{name}.mp4" for name in ("aa", "bb", "cc")]
    for clip in clips[:2]:
        clip.touch()
    (tmp_path / "splits.json").write_text('{"train": ["source-1"], "val": ["source-0", "source-2"], "test": []}')
    files = find_files([write_index(tmp_path / "short.csv", clips)])
    assert [(file.clip_id, file.source, file.split) for file in files if not file.reason] == [
        ("aa", "source-0", "val"),
        ("bb", "source-1", "train"),
    ]
    assert set(files[0].captions) == {*CAPTIONS, "caption"}
    assert [file.reason.partition(": ")[0] for file in files] == ["", "", "file missing"]


def test_one_file(tmp_path: Path) -> None:
    (tmp_path / "a b.mp4").touch()
    (tmp_path / "a b.txt").write_text("words")
    assert taken(find_files([tmp_path / "a b.mp4"])) == {"a b.mp4": "words"}
