"""`luve index`: from a folder as people have it to an index that says all of it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from luve_lightning.cli import index_probes
from luve_lightning.cli.index import clip_ids
from luve_lightning.cli.index_probes import PROBES
from luve_lightning.cli.index_sources import SourceFile
from luve_lightning.data.index_file import read_rows
from luve_lightning.data.video_index import CLIP_ID, SPLITS, VideoIndex
from tests.helpers.luve_process import LuveProcess
from tests.helpers.own_clips import write_nasty_folder
from tests.helpers.run_luve import Outcome, run_luve
from tests.helpers.small_world import write_clip, write_world
from tests.helpers.waiting import wait_for

pytestmark = pytest.mark.slow

Luve = Callable[..., Outcome]


@pytest.fixture
def luve(capsys: pytest.CaptureFixture[str]) -> Luve:
    return lambda *words: run_luve(capsys, "index", *words)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Clips and what lies about beside them; they settle at once."""
    monkeypatch.setattr(index_probes, "_SETTLED_NS", 0)
    clips = tmp_path / "my clips"
    write_clip(clips / "beach day.mp4", 1, 9, 48, 64)
    write_clip(clips / "sub" / "it's “quoted”.mp4", 2, 17, 96, 48)
    write_clip(clips / "河边 🎥.mp4", 3, 33, 48, 48)
    (clips / "beach day.txt").write_text("a beach\r\nwith sea", encoding="utf-8-sig")
    (clips / "河边 🎥.txt").write_text("河边的老人", encoding="utf-8")
    (clips / "empty.mp4").touch()
    (clips / "text.mp4").write_text("hello")
    shutil.copy(clips / "beach day.mp4", clips / "copy.mp4")
    (clips / "link.mp4").symlink_to("beach day.mp4")
    (clips / "loop").symlink_to(clips)
    return clips


def test_a_folder_to_an_index(luve: Luve, folder: Path) -> None:
    outcome = luve(folder, "--output", folder / "index.parquet")
    assert outcome.code == 0, outcome.err
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    assert lines[1:12] == [
        "looked into 7 files",
        "clips 3, 3.7 s",
        "sizes 1 of 64x48, 1 of 48x48, 1 of 48x96",
        "frames/s 3 of 16",
        "frames 9 to 33, half of them 17 or more",
        "captions 2, of 5 to 16, half of them 16 or more characters",
        "no caption 1 (first: it's “quoted”.mp4)",
        lines[8],
        lines[9],
        "test none",
        "left out 5",
    ]
    assert "1 is empty (0 bytes) (first: empty.mp4)" in lines
    assert any(line.startswith("1 cannot be read (first: text.mp4: ") for line in lines)
    assert f"1 copy of another file (first: copy.mp4 is equal to {folder}/beach day.mp4)" in lines
    assert f"1 link to another file (first: link.mp4 is {folder}/beach day.mp4)" in lines
    assert "1 link to a folder that is there already (first: loop)" in lines
    index = VideoIndex.open(folder / "index.parquet")
    assert {(e.path.name, e.width, e.height, e.total_frames, e.captions["caption"]) for e in index.entries} == {
        ("beach day.mp4", 64, 48, 9, "a beach\nwith sea"),
        ("it's “quoted”.mp4", 48, 96, 17, ""),
        ("河边 🎥.mp4", 48, 48, 33, "河边的老人"),
    }
    assert len({entry.clip_id for entry in index.entries}) == 3
    assert [len(index.split(split)) for split in SPLITS] == [2, 1, 0]
    shown = luve("--show", folder / "index.parquet")
    assert shown.out.splitlines()[1:] == outcome.out.splitlines()[2:-1]


def test_a_folder_in_which_much_is_wrong(luve: Luve, tmp_path: Path) -> None:
    """Everything usable is taken, and everything else named with its reason."""
    nasty = write_nasty_folder(tmp_path / "nasty")
    outcome = luve(nasty.folder, "--output", tmp_path / "index.parquet")
    assert outcome.code == 0, outcome.err
    rows = {row.path.relative_to(nasty.folder).as_posix(): row for row in read_rows(tmp_path / "index.parquet")}
    taken = {name: row.entry for name, row in rows.items() if row.entry is not None}
    # What only decoding shows is found when the clips are encoded.
    assert set(taken) == {*nasty.usable, *nasty.damaged}
    assert {name: taken[name].total_frames for name in nasty.clips} == nasty.clips
    assert {name for name, entry in taken.items() if entry.still} == set(nasty.stills)
    assert {name for name, entry in taken.items() if entry.uneven} == {"variable.mp4"}
    assert (taken["phone photo.jpg"].width, taken["phone photo.jpg"].height) == (216, 288), "turned"
    captions = {name: entry.captions["caption"] for name, entry in taken.items()}
    live = {"phone photo.mov": nasty.captions["phone photo.jpg"]}  # a clip and a still with one text
    assert {name: text for name, text in captions.items() if text} == nasty.captions | live
    for name, words in nasty.broken.items():
        assert words in rows[name].reason
    lines = outcome.out.splitlines()
    assert any(line.startswith(f"  stills         {len(nasty.stills)}") for line in lines)
    left_out = len(rows) - len(taken)
    assert f"  left out       {left_out}" in lines
    counted = re.search(r"captions +(\d+).*\n +no caption +(\d+)", outcome.out)
    assert counted
    assert [int(count) for count in counted.groups()] == [len(nasty.captions), len(taken) - len(nasty.captions)]
    counts = [int(line.split()[0]) for line in lines[lines.index(f"  left out       {left_out}") + 1 : -1]]
    assert sum(counts) == left_out
    assert {".DS_Store", "._landscape.mp4", "Thumbs.db", "shopping list.txt"} <= rows.keys() - taken.keys()


def test_again_and_changed(luve: Luve, folder: Path) -> None:
    output = folder.parent / "index.parquet"
    first = luve(folder, "--output", output)
    before = output.read_bytes()
    again = luve(folder, "--output", output)
    assert "looked into    0 files, 7 as before" in again.out
    assert output.read_bytes() == before
    changed = folder / "sub" / "it's “quoted”.mp4"
    then = changed.stat().st_ctime_ns
    assert wait_for(lambda: (write_clip(changed, 5, 21), changed.stat().st_ctime_ns != then)[1])
    write_clip(folder / "new.mp4", 6)
    assert "looked into    2 files, 6 as before" in luve(folder, "--output", output).out
    splits = [{row.entry.url: row.split for row in read_rows(path) if row.entry} for path in (output,)]
    assert {e.path.name: e.total_frames for e in VideoIndex.open(output).entries}[changed.name] == 21
    assert first.code == 0
    assert len(splits[0]) == 4


def test_splits_stay_when_clips_are_added(luve: Luve, folder: Path) -> None:
    output = folder / "index.parquet"
    luve(folder, "--output", output)
    before = {row.entry.url: row.split for row in read_rows(output) if row.entry}
    for i in range(6):
        write_clip(folder / f"{i}.mp4", 10 + i)
    luve(folder, "--output", output)
    after = {row.entry.url: row.split for row in read_rows(output) if row.entry}
    assert before.items() <= after.items()
    assert len(after) == 9


def test_splits_by_file_folder_column_and_list(luve: Luve, folder: Path) -> None:
    def sources(*words: object) -> dict[str, str]:
        output = folder.parent / f"{len(list(folder.parent.iterdir()))}.parquet"
        outcome = luve(folder, "--output", output, *words)
        assert outcome.code == 0, outcome.err
        return {row.path.name: row.entry.url for row in read_rows(output) if row.entry}

    name = folder.name
    beach, quoted, river = "beach day.mp4", "it's “quoted”.mp4", "河边 🎥.mp4"
    by_file = {beach: f"{name}/beach day", quoted: f"{name}/sub/it's “quoted”", river: f"{name}/河边 🎥"}
    assert sources() == sources("--split_by", "file") == by_file
    assert sources("--split_by", "folder") == {beach: name, quoted: f"{name}/sub", river: name}
    splits = folder.parent / "splits.json"
    splits.write_text(json.dumps({"train": [f"{name}/sub"], "val": [], "test": [name]}))
    output = folder.parent / "listed.parquet"
    outcome = luve(folder, "--output", output, "--split_by", "folder", "--splits", splits)
    assert "val            none: the splits given say so; training goes on without validation" in outcome.out
    assert {row.path.name: row.split for row in read_rows(output) if row.entry} == {
        beach: "test",
        quoted: "train",
        river: "test",
    }
    (folder / "metadata.csv").write_text(f"file_name,film\n{beach},one\n{river},two\nsub/{quoted},one\n")
    assert sources("--split_by", "film") == {beach: "one", quoted: "one", river: "two"}
    splits.write_text(json.dumps({"train": [name], "val": [], "test": []}))
    outcome = luve(folder, "--output", output, "--split_by", "folder", "--splits", splits)
    assert outcome.code == 2
    assert outcome.error_lines[0].endswith(f"splits.json: 1 sources of these files are not listed: {name}/sub")


def test_scenes_of_one_video_stay_together(luve: Luve, tmp_path: Path) -> None:
    for number in range(3):
        write_clip(tmp_path / "clips" / f"film-Scene-{number:03d}.mp4", number)
    outcome = luve(tmp_path / "clips", "--output", tmp_path / "index.parquet")
    assert "val            none: there is one source only, clips/film; training goes on without" in outcome.out


def test_a_source_in_two_splits_is_refused(luve: Luve, folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,source,split\nbeach day.mp4,one,train\n河边 🎥.mp4,one,val\n")
    outcome = luve(folder, "--output", folder / "index.parquet")
    assert outcome.code == 2
    assert "split: its source 'one' is in train and in val: clips of one source video would leak" in outcome.err
    assert not (folder / "index.parquet").exists()


def test_several_sources_and_the_index_itself(luve: Luve, folder: Path, tmp_path: Path) -> None:
    csv = write_world(tmp_path / "ultra", 2)
    output = tmp_path / "index.parquet"
    assert luve(folder, csv, "--output", output).code == 0
    index = VideoIndex.open(output)
    assert len(index) == 5
    splits = {entry.clip_id: split for split in SPLITS for entry in VideoIndex.open(csv).split(split)}
    ours = {entry.clip_id: split for split in SPLITS for entry in index.split(split)}
    assert splits.items() <= ours.items()
    assert luve(output, "--output", tmp_path / "again.parquet").code == 0
    again = VideoIndex.open(tmp_path / "again.parquet")
    assert again.entries == index.entries
    assert again.splits == index.splits
    assert [entry.captions for entry in again.entries] == [entry.captions for entry in index.entries]
    assert "clips          2," in luve("--show", csv).out


def test_what_a_configuration_would_use(luve: Luve, folder: Path, tmp_path: Path) -> None:
    index = folder / "index.parquet"
    Image.new("RGB", (96, 96)).save(folder / "still.png")
    assert luve(folder, "--output", index).code == 0
    single, several, limited = (tmp_path / name for name in ("single.yaml", "several.yaml", "limited.yaml"))
    single.write_text("backbone: none\nsize: [48, 64]\nframes: 9\n")
    several.write_text(
        "data:\n  class_path: X\n  init_args: {size: [[48, 64], [80, 48], [48, 48]], frames: [1, 9, 17], fps: 8}\n"
    )
    limited.write_text("size: {area: 2304, multiple: 16}\nframes: 9\nkeep: {min_frames: 17, fps_range: [10, 20]}\n")

    def used(config: Path) -> list[str]:
        lines = luve("--show", index, "--used_by", config).out.splitlines()
        start = next(number for number, line in enumerate(lines) if line.startswith("  used by "))
        return [" ".join(line.split()) for line in lines[start:]]

    head, *lines = used(single)
    assert head.startswith(f"used by {single}: 1 of 4: ")
    assert lines[:2] == ["1 in 48x64x9", "not used 3"]
    # Two clips are narrower, and the picture has one frame.
    assert len(lines) == 3
    assert lines[2].startswith("3 fits no bucket (first: ")
    head, *lines = used(several)
    assert head.startswith(f"used by {several}: 4 of 4: ")
    # At 8 frames a second 17 frames of 16 are 9, and 9 are 5.
    assert lines == ["1 in 48x48x17", "1 in 80x48x9", "1 in 48x64x1", "1 in 48x48x1"]
    head, *lines = used(limited)
    assert "1 too few frames (first: beach day.mp4: 9, at least 17 wanted)" in lines
    outcome = luve("--show", index, "--used_by", "experiments/generate/mini.yaml")
    assert outcome.code == 2
    assert "has no size and frames" in outcome.error_lines[0]


def test_files_of_equal_names_have_ids_of_their_own(luve: Luve, tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two", "three/two")):
        write_clip(tmp_path / name / "a.mp4", number)
    luve(*(tmp_path / name for name in ("one", "two", "three/two")), "--output", tmp_path / "index.parquet")
    ids = [entry.clip_id for entry in VideoIndex.open(tmp_path / "index.parquet").entries]
    assert len(set(ids)) == 3
    assert all(name.startswith("a-") for name in ids)
    shutil.move(tmp_path / "one", tmp_path / "moved")
    luve(tmp_path / "moved", "--output", tmp_path / "moved.parquet")
    assert VideoIndex.open(tmp_path / "moved.parquet").entries[0].clip_id == ids[0]


def test_an_unreadable_file(luve: Luve, folder: Path) -> None:
    (folder / "河边 🎥.mp4").chmod(0)
    if os.access(folder / "河边 🎥.mp4", os.R_OK):
        pytest.skip("this user may read everything")
    outcome = luve(folder, "--output", folder / "index.parquet")
    assert "cannot be read (first: 河边 🎥.mp4: Permission denied)" in outcome.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected sources and --output INDEX.parquet, or --show INDEX"),
        (("{folder}",), "expected sources and --output INDEX.parquet, or --show INDEX"),
        (("{folder}", "--output", "{folder}/index.csv"), "output: expected a name that ends in .parquet, got"),
        (("{folder}/none", "--output", "{folder}/i.parquet"), "none: no such file or folder"),
        (("{folder}", "--show", "{folder}/i.parquet"), "show: takes no sources and no output"),
        (("--show", "{folder}/i.parquet"), "show: no such index"),
        (("--show", "{folder}"), "a folder, not an index; make one: luve index"),
        (("{folder}", "--output", "{folder}/i.parquet", "--splits", "no.json"), "splits: no such file: no.json"),
        (("{folder}", "--output", "{folder}/i.parquet", "--processes", 0), "processes: expected at least 1, got 0"),
        (("{folder}/text.mp4", "--output", "{folder}/i.parquet"), "holds no clip that can be used"),
        (("{folder}", "--output", "{folder}/i.parquet", "--split_by", "scene"), "a column of the tables, which has v"),
        (("{folder}", "--output", "/proc/i.parquet"), "/proc/i.parquet: No such file or directory"),
        (("{folder}", "--output", "{folder}/text.mp4/i.parquet"), "text.mp4/i.parquet: Not a directory"),
    ],
)
def test_errors_are_one_line(words: tuple[object, ...], message: str, luve: Luve, folder: Path) -> None:
    outcome = luve(*(str(word).format(folder=folder) for word in words))
    assert outcome.code == 2
    assert message in outcome.error_lines[0]
    assert len(outcome.error_lines) == 1


def test_another_file_is_not_overwritten(luve: Luve, folder: Path) -> None:
    (folder / "mine.parquet").write_bytes(b"something else")
    outcome = luve(folder, "--output", folder / "mine.parquet")
    assert outcome.code == 2
    assert "is there and is no index; it is left as it is" in outcome.err
    assert (folder / "mine.parquet").read_bytes() == b"something else"


def test_an_index_that_cannot_be_read_is_not_replaced(luve: Luve, folder: Path) -> None:
    """It may say what validates: another split would let a training see it."""
    output = folder / "index.parquet"
    assert luve(folder, "--output", output).code == 0
    table, whole = pq.read_table(output), output.read_bytes()
    later = table.replace_schema_metadata({b"luve_index": b"999"})
    pq.write_table(later, folder / "later.parquet")
    for content, why in (
        (whole[: len(whole) // 2], "cannot be read: "),
        ((folder / "later.parquet").read_bytes(), "an index of another version (version 999); make it again"),
    ):
        output.write_bytes(content)
        outcome = luve(folder, "--output", output)
        assert outcome.code == 2
        assert f"output: {output}: {why}" in outcome.err
        assert "; delete it first" in outcome.err
        assert output.read_bytes() == content
    output.unlink()
    assert luve(folder / "sub", "--output", output).code == 0


def _settled() -> None:
    index_probes._SETTLED_NS = 0


def test_killed_and_gone_on_beside_another(luve: Luve, folder: Path, tmp_path: Path) -> None:
    """Two indexes of the same clips share what was found; a kill loses only what was being looked into."""
    long = write_clip(tmp_path / "long.mp4", 1, 600, 16, 16)
    for number in range(100):
        os.link(long, folder / f"{number}.mp4")
    output = tmp_path / "index.parquet"
    words = ("index", folder, "--output", output, "--processes", 1)
    victim = LuveProcess(tmp_path / "log", *words, prepare=_settled)
    assert wait_for(lambda: (tmp_path / PROBES).is_file() and (tmp_path / PROBES).read_text().count("\n") > 5)
    victim.process.kill()
    victim.process.join()
    assert not output.exists()
    known = (tmp_path / PROBES).read_text().count("\n")
    assert known < 107
    other = LuveProcess(tmp_path / "log", *words[:2], "--output", tmp_path / "other.parquet", prepare=_settled)
    outcome = luve(folder, "--output", output)
    other.process.join()
    looked, before = (int(word) for word in outcome.out.splitlines()[1].split() if word.isdigit())
    assert looked + before == 107
    assert before >= known
    assert output.read_bytes() == (tmp_path / "other.parquet").read_bytes()
    assert len(VideoIndex.open(output)) == 4


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=60)


@given(st.lists(st.tuples(NAMES.filter(lambda name: name not in (".", "..")), st.sampled_from(["", "id", "../x"]))))
def test_ids_are_unique_stable_and_file_names(named: list[tuple[str, str]]) -> None:
    paths = {Path(f"/{number}/{name}"): (name, own) for number, (name, own) in enumerate(named)}
    files = [
        SourceFile(path, name, "root", clip_id=own if CLIP_ID.fullmatch(own) else "")
        for path, (name, own) in paths.items()
    ]
    ids = clip_ids(files)
    assert len(set(ids.values())) == len(files)
    assert all(CLIP_ID.fullmatch(name) for name in ids.values())
    assert clip_ids(files[:1]).items() <= ids.items()
