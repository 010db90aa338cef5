from __future__ import annotations

import csv
import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning.data.video_index import CAPTIONS, COLUMNS, SPLITS, ClipEntry, Limits, VideoIndex, VideoIndexError


def row(clip_id: str, url: str = "a", **changes: Any) -> dict[str, Any]:
    """A row as UltraVideo has them."""
    values: dict[str, Any] = {
        "clip_id": clip_id,
        "url": url,
        "frame_width": 3840,
        "frame_height": 2160,
        "fps": 29.97,
        "start_frame": 120,
        "end_frame": 240,
        "total_frames": 120,
        "start_time": "00:00:04.004",
        "end_time": "00:00:08.008",
        "duration": 4.004,
        "vtss_score": 3.9,
        "motion_score": 1.7,
        "video_clip_score": 0.2,
    }
    return values | {name: f'{name} of {clip_id}, "quoted",\nand on' for name in CAPTIONS} | changes


def write(folder: Path, rows: Iterable[dict[str, Any]], columns: Iterable[str] = COLUMNS) -> Path:
    """A CSV with clips/ beside it that holds a file for each row."""
    (folder / "clips").mkdir(exist_ok=True)
    path = folder / "clips.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), extrasaction="ignore")
        writer.writeheader()
        for values in rows:
            writer.writerow(values)
            if str(values["clip_id"]).isalnum():
                (folder / "clips" / f"{values['clip_id']}.mp4").touch()
    return path


def reasons(index: VideoIndex) -> dict[str, str]:
    return dict(index.dropped)


def test_columns_are_ultravideos() -> None:
    assert len(COLUMNS) == 24
    assert COLUMNS[:8] == (
        "clip_id",
        "url",
        "frame_width",
        "frame_height",
        "fps",
        "start_frame",
        "end_frame",
        "total_frames",
    )
    assert COLUMNS[-1] == "Summarized Description"


def test_entries_hold_what_the_csv_says(tmp_path: Path) -> None:
    index = VideoIndex.from_csv(write(tmp_path, [row("c1", "v1"), row("c2", "v2", fps="25", total_frames="97.0")]))
    assert len(index) == 2
    assert index.dropped == []
    first, second = index.entries
    assert (first.clip_id, first.url, first.fps, first.total_frames) == ("c1", "v1", 29.97, 120)
    assert (first.width, first.height) == (3840, 2160)
    assert first.path == tmp_path / "clips" / "c1.mp4"
    assert tuple(first.captions) == CAPTIONS
    assert first.captions["Style"] == 'Style of c1, "quoted",\nand on'
    assert (second.fps, second.total_frames) == (25.0, 97)


def test_columns_in_any_order_and_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path, [row("c1")], reversed(COLUMNS))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert VideoIndex.from_csv(path).entries[0].clip_id == "c1"


def test_missing_and_unknown_columns_are_named_in_one_line(tmp_path: Path) -> None:
    columns = [c for c in COLUMNS if c not in ("fps", "Shot Type")] + ["FPS", "notes"]
    with pytest.raises(VideoIndexError) as error:
        VideoIndex.from_csv(write(tmp_path, [row("c1")], columns))
    assert str(error.value) == (
        f"{tmp_path / 'clips.csv'}: missing columns: fps, Shot Type; unknown columns: 'FPS' (did you mean "
        "'fps'?), 'notes' (expected UltraVideo's 24 columns)"
    )


@pytest.mark.parametrize("closed", [False, True])
def test_an_open_quote_swallows_no_rows(closed: bool, tmp_path: Path) -> None:
    """Read leniently, the last caption of c2 goes on to the next quote or the file's end, and its rows are gone."""
    path = write(tmp_path, [row(f"c{n}", **{"Summarized Description": f"text {n}"}) for n in range(1, 6)])
    text = path.read_text(encoding="utf-8").replace("text 2", '"text 2')
    path.write_text(text.replace("text 4", 'text "4"') if closed else text, encoding="utf-8")
    with pytest.raises(VideoIndexError, match=r"clips\.csv: line \d+: not CSV") as error:
        VideoIndex.from_csv(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (";".join(COLUMNS), "its columns are separated by ';', expected commas"),
        ("\t".join(COLUMNS), r"its columns are separated by '\\t', expected commas"),
    ],
)
def test_columns_separated_otherwise_are_told_in_short(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text(content)
    with pytest.raises(VideoIndexError, match=r"clips\.csv: " + message):
        VideoIndex.from_csv(tmp_path / "clips.csv")


def test_a_column_given_twice_is_named(tmp_path: Path) -> None:
    with pytest.raises(VideoIndexError, match="columns given twice: url "):
        VideoIndex.from_csv(write(tmp_path, [row("c1")], [*COLUMNS, "url"]))


def test_more_columns_are_a_warning(tmp_path: Path) -> None:
    path = write(tmp_path, [row("c1")], [*COLUMNS, "hps", "notes"])
    with pytest.warns(UserWarning, match="columns not used: hps, notes"):
        assert len(VideoIndex.from_csv(path)) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fps": 0.5}, "bad fps: 0.5, 1 to 240 expected"),
        ({"fps": 241}, "bad fps: 241, 1 to 240 expected"),
        ({"fps": "nan"}, "bad fps: nan, 1 to 240 expected"),
        ({"fps": "fast"}, "bad fps: 'fast' is not a number"),
        ({"fps": ""}, "bad fps: '' is not a number"),
        ({"total_frames": 0}, "bad total_frames: 0, 1 to inf expected"),
        ({"total_frames": "inf"}, "bad total_frames: inf, 1 to inf expected"),
        ({"total_frames": 12.5}, "bad total_frames: 12.5, a whole number expected"),
        ({"frame_width": 0}, "bad frame_width: 0, 1 to 16384 expected"),
        ({"frame_height": -2160}, "bad frame_height: -2160, 1 to 16384 expected"),
        ({"frame_height": 20000}, "bad frame_height: 20000, 1 to 16384 expected"),
        ({"url": " "}, "no url"),
    ],
)
def test_bad_values_drop_the_row(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    index = VideoIndex.from_csv(write(tmp_path, [row("good"), row("bad", **changes)]))
    assert [entry.clip_id for entry in index.entries] == ["good"]
    assert index.dropped == [("bad", reason)]


@pytest.mark.parametrize("clip_id", ["", "../up", "a/b", ".hidden", "a b", "ä", "x" * 129])
def test_clip_ids_that_are_no_file_names(clip_id: str, tmp_path: Path) -> None:
    index = VideoIndex.from_csv(write(tmp_path, [row("good"), row(clip_id)]))
    assert [entry.clip_id for entry in index.entries] == ["good"]
    assert index.dropped[0][1].startswith("bad clip_id: ")


def test_duplicates_missing_files_and_malformed_rows(tmp_path: Path) -> None:
    path = write(tmp_path, [row("c1"), row("c2"), row("c1", "b", fps=50), row("c3")])
    with path.open("a") as file:
        file.write("c4,only three,fields\n\n")
    (tmp_path / "clips" / "c2.mp4").unlink()
    index = VideoIndex.from_csv(path)
    assert [(entry.clip_id, entry.fps) for entry in index.entries] == [("c1", 29.97), ("c3", 29.97)]
    assert index.dropped == [
        ("c2", f"file missing: {tmp_path / 'clips' / 'c2.mp4'}"),
        ("c1", "duplicate clip_id: an earlier row has it"),
        ("", "malformed row: too few or too many fields"),
    ]


def test_filters(tmp_path: Path) -> None:
    rows = [
        row("small", frame_width=1280, frame_height=720),
        row("short", total_frames=48),
        row("slow", fps=12),
        row("fast", fps=60),
        row("good", total_frames=49, fps=24),
    ]
    keep = Limits(min_frames=49, min_height=1440, min_width=2560, fps_range=(24, 50))
    index = VideoIndex.from_csv(write(tmp_path, rows), keep=keep)
    assert [entry.clip_id for entry in index.entries] == ["good"]
    assert reasons(index) == {
        "small": "frame too small: 1280x720, at least 2560x1440 wanted",
        "short": "too few frames: 48, at least 49 wanted",
        "slow": "frame rate not wanted: 12, 24 to 50 wanted",
        "fast": "frame rate not wanted: 60, 24 to 50 wanted",
    }


def test_summary_counts_what_was_dropped(tmp_path: Path) -> None:
    rows = [row("c1", "v1"), row("c2", "v2"), row("d1", fps=0), row("d2", fps=999), row("d3", total_frames=3)]
    index = VideoIndex.from_csv(write(tmp_path, rows), keep=Limits(min_frames=9))
    assert index.summary().splitlines() == [
        f"{tmp_path / 'clips.csv'}: 2 clips of 2 source videos, 3 rows dropped",
        "       2  bad fps (first: d1 0, 1 to 240 expected)",
        "       1  too few frames (first: d3 3, at least 9 wanted)",
    ]


def test_nothing_left_says_why(tmp_path: Path) -> None:
    with pytest.raises(VideoIndexError, match="no clip can be used: 2 too few frames, 1 bad fps") as error:
        VideoIndex.from_csv(write(tmp_path, [row("a"), row("b"), row("c", fps=-1)]), keep=Limits(min_frames=500))
    assert "\n" not in str(error.value)
    with pytest.raises(VideoIndexError, match="it has no rows"):
        VideoIndex.from_csv(write(tmp_path, []))


def test_a_missing_csv_of_a_relative_path_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        VideoIndex.from_csv("data/mini/world/clips.csv")
    assert str(caught.value) == (
        f"data/mini/world/clips.csv: no such CSV in {tmp_path}, to which the path is relative; "
        "`make mini-world` renders the mini world's, in the repository"
    )
    with pytest.raises(FileNotFoundError, match=r"to which the path is relative$"):
        VideoIndex.from_csv("mine.csv")


def test_files_that_are_no_csv(tmp_path: Path) -> None:
    path = tmp_path / "clips.csv"
    with pytest.raises(FileNotFoundError, match=r"clips\.csv: no such CSV$"):
        VideoIndex.from_csv(path)
    path.touch()
    with pytest.raises(VideoIndexError, match="missing columns: clip_id, url"):
        VideoIndex.from_csv(path)
    path.write_bytes(b"\xff\xfe" + "clip_id,url".encode("utf-16-le"))
    with pytest.raises(VideoIndexError, match=r"clips\.csv: not UTF-8 text"):
        VideoIndex.from_csv(path)
    path.write_text("file_name,caption\na.mp4,a cat\n")
    with pytest.raises(VideoIndexError, match=r"none of UltraVideo's columns is there; expected .* luve index makes"):
        VideoIndex.from_csv(path)
    path = write(tmp_path, [row("c1")])
    path.write_text(path.read_text() + '"' + "x" * 200_000)  # a quote that is never closed
    with pytest.raises(VideoIndexError, match=r"line \d+: not CSV"):
        VideoIndex.from_csv(path)


def test_the_folder_of_clips(tmp_path: Path) -> None:
    path = write(tmp_path, [row("c1")])
    assert VideoIndex.from_csv(path, tmp_path / "clips").entries[0].path == tmp_path / "clips" / "c1.mp4"
    with pytest.raises(FileNotFoundError, match="no such folder of clips"):
        VideoIndex.from_csv(path, tmp_path / "elsewhere")
    (tmp_path / "clips").rename(tmp_path / "gone")
    (tmp_path / "gone" / "c1.mp4").rename(tmp_path / "c1.mp4")
    assert VideoIndex.from_csv(path).entries[0].path == tmp_path / "c1.mp4"  # beside the CSV


# Splits --------------------------------------------------------------------------------------------------


def index_of(urls: list[str]) -> VideoIndex:
    entries = [ClipEntry(f"c{i}", Path(f"c{i}.mp4"), url, 24.0, 33, 192, 192, {}) for i, url in enumerate(urls)]
    return VideoIndex(entries)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=40),
    st.tuples(st.integers(0, 10), st.integers(0, 10), st.integers(1, 10)),
)
def test_no_source_video_is_in_two_splits(urls: list[str], weights: tuple[int, int, int]) -> None:
    index = index_of(urls)
    train, val, test = (weight / sum(weights) for weight in weights)
    parts = {name: index.split(name, (train, val, test)) for name in SPLITS}
    owners = [{entry.url for entry in part} for part in parts.values()]
    assert sum(len(owner) for owner in owners) == len(set(urls))
    assert sorted(e.clip_id for part in parts.values() for e in part) == sorted(e.clip_id for e in index.entries)


def test_fractions_are_met() -> None:
    index = index_of([f"video {i}" for i in range(4000)])
    shares = [len(index.split(name, (0.7, 0.2, 0.1))) / 4000 for name in SPLITS]
    assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.02)  # about three standard deviations
    assert [len(index.split(name, (1, 0, 0))) for name in SPLITS] == [4000, 0, 0]


def test_split_does_not_depend_on_other_videos_or_on_the_process() -> None:
    few, many = index_of(["a", "b", "c"]), index_of([f"v{i}" for i in range(100)] + ["c", "a", "b"])
    for name in SPLITS:
        here = {entry.url for entry in few.split(name, (0.4, 0.3, 0.3))}
        assert here == {e.url for e in many.split(name, (0.4, 0.3, 0.3))} & {"a", "b", "c"}
    # Fixed for good: a change here mixes the test videos of trained models into their successors' training.
    placed = {
        name: "".join(e.url for e in index_of(list("abcdefghijkl")).split(name, (0.5, 0.25, 0.25))) for name in SPLITS
    }
    assert placed == {"train": "bcdefj", "val": "hkl", "test": "agi"}


def test_splits_file_decides(tmp_path: Path) -> None:
    path = write(tmp_path, [row("c1", "v1"), row("c2", "v2"), row("c3", "v3"), row("c4", "v2")])
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["v2"], "val": ["v1"], "test": ["v3"]}))
    index = VideoIndex.from_csv(path)
    assert {name: [e.clip_id for e in index.split(name)] for name in SPLITS} == {
        "train": ["c2", "c4"],
        "val": ["c1"],
        "test": ["c3"],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train": ["v1", "v2"], "val": ["v1"], "test": []}', "'v1' is listed twice, in train and in val"),
        ('{"train": ["v1", "v1"], "val": ["v2"], "test": []}', "'v1' is listed twice, in train and in train"),
        ('{"train": ["v1"], "val": [], "test": []}', "1 urls of the CSV are not listed: v2"),
        ('{"train": ["v1", "v2"]}', r"expected the keys train, val, test, got \['train'\]"),
        ('{"train": "v1", "val": ["v2"], "test": []}', "train: expected a list of urls"),
        ("[1, 2]", "expected the keys train, val, test, got list"),
        ('{"train": ["v1"], "train": ["v2"], "val": ["v1"], "test": []}', "not JSON .'train' is there twice"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"train": {}, "val": [], "test": []}', "train: expected a list of urls"),
        ('{"train": [["v1"]], "val": [], "test": []}', "train: expected a list of urls"),
    ],
)
def test_bad_splits_files(content: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, [row("c1", "v1"), row("c2", "v2")])
    (tmp_path / "splits.json").write_text(content)
    with pytest.raises(VideoIndexError, match=r"splits\.json: " + message) as error:
        VideoIndex.from_csv(path)
    assert "\n" not in str(error.value)


def test_a_splits_file_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path) -> None:
    path = write(tmp_path, [row("c1", "v1")])
    splits = tmp_path / "splits.json"
    splits.symlink_to("nowhere.json")
    with pytest.raises(VideoIndexError, match=r"splits\.json: a link to nothing"):
        VideoIndex.from_csv(path)
    splits.unlink()
    splits.mkdir()
    with pytest.raises(VideoIndexError, match=r"splits\.json: not a file"):
        VideoIndex.from_csv(path)
    splits.rmdir()
    splits.write_text('{"train": [], "val": ["v1"], "test": []}', encoding="utf-8-sig")
    assert len(VideoIndex.from_csv(path).split("val")) == 1


def test_urls_that_only_the_splits_file_knows_are_named(tmp_path: Path) -> None:
    """Videos whose clips were all dropped are known; others hint at the wrong file."""
    path = write(tmp_path, [row("c1", "v1"), row("c2", "dropped", fps=0)])
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["v1"], "val": ["dropped"], "test": []}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VideoIndex.from_csv(path)
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["v1"], "val": ["dropped"], "test": ["other"]}))
    with pytest.warns(UserWarning, match="1 urls are not in the CSV: other"):
        VideoIndex.from_csv(path)


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.5, 0.6, -0.1), (0.9, 0.2, 0.1)])
def test_fractions_that_are_none(fractions: Any) -> None:
    with pytest.raises(ValueError, match="three shares >= 0 that sum to 1"):
        index_of(["a"]).split("train", fractions)


def test_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="expected one of train, val, test, got 'validation'"):
        index_of(["a"]).split("validation")  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_tenth_of_ultravideo_loads_without_asking_for_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4,200 rows of all its source videos with captions; on a network's disk each question takes milliseconds."""
    count = 4_200
    text = "A mountain lake at dawn, filmed from a slowly rising drone. " * 4
    rows = (row(f"{i:040x}", f"v{i % 939}", **dict.fromkeys(CAPTIONS, text)) for i in range(count))
    path = write(tmp_path, [])
    with path.open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS).writerows(rows)
    for i in range(count):
        (tmp_path / "clips" / f"{i:040x}.mp4").touch()
    asked, ask = [], os.stat
    monkeypatch.setattr(os, "stat", lambda *args, **options: (asked.append(args), ask(*args, **options))[1])
    index = VideoIndex.from_csv(path)
    sizes = [len(index.split(name)) for name in SPLITS]
    assert sum(sizes) == len(index) == count
    assert 0 < len(asked) < 100
