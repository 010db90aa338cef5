from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from luve_lightning.data.index_file import IndexRow, read_rows, write_index
from luve_lightning.data.video_index import ClipEntry, Limits, VideoIndex, VideoIndexError

CLIP = ClipEntry("a-1", Path("a.mp4"), "one", 24.0, 33, 192, 108, {"caption": "河边的老人"}, False, True, 1.375)
STILL = ClipEntry("b-2", Path("b.png"), "two", 0.0, 1, 640, 480, {"caption": ""}, still=True)


def write(path: Path, entries: Sequence[ClipEntry], extra: Sequence[IndexRow] = ()) -> Path:
    """An index of files beside it, which are made; the second source is for validation."""
    for entry in entries:
        (path.parent / entry.path.name).touch()
    rows = [
        IndexRow(path.parent / entry.path.name, entry, "val" if entry.url == "two" else "train") for entry in entries
    ]
    write_index(path, [*rows, *extra])
    return path


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    left_out = IndexRow(tmp_path / "c.mp4", reason="is empty (0 bytes)")
    index = VideoIndex.open(write(tmp_path / "index.parquet", [CLIP, STILL], [left_out]))
    assert index.entries == [replace(entry, path=tmp_path / entry.path) for entry in (CLIP, STILL)]
    assert [entry.captions for entry in index.entries] == [CLIP.captions, STILL.captions]
    assert index.dropped == [("c.mp4", "is empty (0 bytes)")]
    assert index.own
    assert [entry.clip_id for entry in index.split("val")] == ["b-2"]
    assert not index.split("test")
    assert "2 clips of 2 source videos, 1 row dropped" in index.summary()


def test_a_reason_that_is_a_name_is_told_once(tmp_path: Path) -> None:
    left_out = [IndexRow(tmp_path / name, reason=f"hidden: {name}") for name in (".a", ".b")]
    index = VideoIndex.open(write(tmp_path / "index.parquet", [CLIP], left_out))
    assert index.summary().endswith("hidden (first: .a)")


def test_who_opens_an_index_is_told_what_is_new(tmp_path: Path) -> None:
    """Reasons that `luve index` told are counted; what this opening drops is told with its reason."""
    left_out = [IndexRow(tmp_path / name, reason="is empty (0 bytes)") for name in ("c.mp4", "d.mp4")]
    path = write(tmp_path / "index.parquet", [CLIP, STILL], left_out)
    index = VideoIndex.open(path, keep=Limits(min_height=200))
    first, *lines = index.summary(again=False).splitlines()
    assert first == f"{path}: 1 clip of 1 source video, 3 rows dropped"
    assert lines[0] == f"       2  left out by luve index (luve index --show {path} says why)"
    (other,) = lines[1:]
    assert other.startswith("       1  ")
    assert CLIP.clip_id in other
    assert "is empty" in index.summary()


def test_a_missing_index_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.parquet: no such index$"):
        VideoIndex.open(tmp_path / "none.parquet")


def test_the_folder_can_be_moved(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    write(tmp_path / "here" / "index.parquet", [CLIP])
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert VideoIndex.open(tmp_path / "there" / "index.parquet").entries[0].path == tmp_path / "there" / "a.mp4"
    shutil.move(tmp_path / "there" / "index.parquet", tmp_path / "index.parquet")
    with pytest.raises(VideoIndexError, match=r"no clip can be used: 1 file missing.*a\.mp4; run luve index again$"):
        VideoIndex.open(tmp_path / "index.parquet")
    assert VideoIndex.open(tmp_path / "index.parquet", tmp_path / "there").entries[0].path.is_file()
    with pytest.raises(FileNotFoundError, match="no such folder of clips"):
        VideoIndex.open(tmp_path / "index.parquet", tmp_path / "nowhere")


def test_files_elsewhere_are_written_by_their_whole_path(tmp_path: Path) -> None:
    for name in ("clips", "lists"):
        (tmp_path / name).mkdir()
    (tmp_path / "clips" / "a.mp4").touch()
    write_index(tmp_path / "lists" / "index.parquet", [IndexRow(tmp_path / "clips" / "a.mp4", CLIP)])
    assert VideoIndex.open(tmp_path / "lists" / "index.parquet").entries[0].path == tmp_path / "clips" / "a.mp4"


def test_limits_are_of_clips_not_of_stills(tmp_path: Path) -> None:
    path = write(tmp_path / "index.parquet", [CLIP, STILL])
    index = VideoIndex.open(path, keep=Limits(min_frames=40, fps_range=(20, 30)))
    assert [entry.clip_id for entry in index.entries] == ["b-2"]
    assert index.dropped == [("a-1", "too few frames: 33, at least 40 wanted")]
    index = VideoIndex.open(path, keep=Limits(min_width=200))
    assert index.dropped == [("a-1", "frame too small: 192x108, at least 200x1 wanted")]


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, [CLIP, STILL]).read_bytes() for name in ("one.parquet", "two.parquet"))
    assert one == two


def test_what_is_no_index_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"path": ["a.mp4"]}), path)
    with pytest.raises(VideoIndexError, match=r"a Parquet file, but no index; make one: luve index other\.parquet"):
        VideoIndex.open(path)
    path.write_bytes(write(tmp_path / "index.parquet", [CLIP]).read_bytes()[:-20])
    with pytest.raises(VideoIndexError, match="cannot be read") as error:
        VideoIndex.open(path)
    assert "\n" not in str(error.value)
    with pytest.raises(VideoIndexError, match="a folder, not an index; make one: luve index"):
        VideoIndex.open(tmp_path)
    table = pq.read_table(tmp_path / "index.parquet")
    pq.write_table(table.drop_columns(["split"]), path)
    with pytest.raises(VideoIndexError, match=r"an index of another version \(it lacks split\); make it again"):
        VideoIndex.open(path)
    pq.write_table(table.replace_schema_metadata({b"luve_index": b"9"}), path)
    with pytest.raises(VideoIndexError, match=r"an index of another version \(version 9\)"):
        VideoIndex.open(path)


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "index.parquet"
    rows = [IndexRow(tmp_path / "a.mp4", replace(CLIP, path=tmp_path / "a.mp4"), "test", note="caption cut: at 4096")]
    write_index(path, rows)
    assert read_rows(path) == rows
