"""Folders of videos matched by name, and their prompts."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from luve_lightning.evaluation.video_sets import find_video_sets, read_prompts


def folder(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).touch()
    return path


def test_what_methods_and_originals_lack_is_known(tmp_path: Path) -> None:
    first = folder(tmp_path / "first", "a.mp4", "b.mp4", "x.mp4")
    second = folder(tmp_path / "second", "b.webm", "c.mp4", "a.mp4")
    originals = folder(tmp_path / "originals", "a.mp4", "b.mp4", "d.mp4")
    sets = find_video_sets({"one": first, "two": second}, originals)
    assert sets.names == ["a", "b", "c", "d", "x"]
    assert sets.methods["two"]["b"] == second / "b.webm"
    assert sets.missing() == {"one": ["c"], "two": ["x"]}
    assert sets.without_original() == ["c", "x"]
    alone = find_video_sets({"one": first})
    assert (alone.missing(), alone.without_original(), alone.originals) == ({}, [], {})


def test_prompts_beside_the_videos(tmp_path: Path) -> None:
    videos = folder(tmp_path / "videos", "a.mp4", "b.mp4", "c.mp4")
    (videos / "a.json").write_text(json.dumps({"prompt": "ein Hund", "more": 1}))
    (videos / "b.json").write_text(json.dumps(["no prompt"]))
    assert find_video_sets({"m": videos}).prompts == {"a": "ein Hund"}
    (videos / "c.json").write_text("{")
    with pytest.raises(ValueError, match=r"c\.json: not JSON"):
        find_video_sets({"m": videos})


def test_prompts_in_a_table(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('name,prompt\na.mp4,"one, two"\nclip.v2,three\n')
    (tmp_path / "p.jsonl").write_text(
        '{"clip_id": "a", "prompt": "one, two"}\n\n{"video": "clip.v2", "prompt": "three"}\n'
    )
    expected = {"a": "one, two", "clip.v2": "three"}
    assert read_prompts(tmp_path / "p.csv") == expected
    assert read_prompts(tmp_path / "p.jsonl") == expected
    videos = folder(tmp_path / "videos", "a.mp4")
    (videos / "a.json").write_text("not looked at")
    assert find_video_sets({"m": videos}, prompts=tmp_path / "p.csv").prompts == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "name,text\na,b\n", r"row 1: expected the keys name and prompt"),
        ("p.jsonl", '{"name": "a", "prompt": 1}\n', r"row 1: expected the keys"),
        ("p.jsonl", "[1, 2]\n", r"row 1: expected the keys"),
        ("p.jsonl", "{\n", "cannot be read"),
        ("p.txt", "", r"expected a \.csv or a \.jsonl file"),
    ],
)
def test_other_tables_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_folders_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    videos, others = folder(tmp_path / "v", "a.mp4"), folder(tmp_path / "o", "b.mp4")
    empty = folder(tmp_path / "e", "notes.txt")
    with pytest.raises(ValueError, match="expected at least one method"):
        find_video_sets({})
    with pytest.raises(ValueError, match=r"reference: no video in .* has the name of a video of m"):
        find_video_sets({"m": videos}, others)
    with pytest.raises(FileNotFoundError, match=r"videos\.m: .*: no videos there"):
        find_video_sets({"m": empty})
    with pytest.raises(FileNotFoundError, match=r"reference: .*: no such folder"):
        find_video_sets({"m": videos}, tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"prompts: .*: no such file"):
        find_video_sets({"m": videos}, prompts=tmp_path / "nothing.csv")
    for name in ("a|b", "../../x", "..", "", "a/b", "-x", "a\nb"):
        with pytest.raises(ValueError, match=r"^videos: '.*': expected letters, digits"):
            find_video_sets({name: videos})


COMPOSED, APART = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def test_names_match_however_accents_are_written(tmp_path: Path) -> None:
    first = folder(tmp_path / "first", f"{COMPOSED}.mp4")
    second = folder(tmp_path / "second", f"{APART}.mp4")
    (second / f"{APART}.json").write_text(json.dumps({"prompt": "a cup"}))
    originals = folder(tmp_path / "originals", f"{APART}.webm")
    sets = find_video_sets({"one": first, "two": second}, originals)
    assert sets.names == [COMPOSED]
    assert (sets.missing(), sets.without_original()) == ({}, [])
    assert sets.methods["two"][COMPOSED] == second / f"{APART}.mp4", "the name on disk stays"
    assert sets.methods["two"][COMPOSED].is_file()
    assert sets.prompts == {COMPOSED: "a cup"}
    (tmp_path / "p.jsonl").write_text(json.dumps({"name": f"{APART}.mov", "prompt": "a cup"}))
    assert find_video_sets({"one": first}, prompts=tmp_path / "p.jsonl").prompts == {COMPOSED: "a cup"}
    (second / f"{COMPOSED}.mp4").touch()
    with pytest.raises(ValueError, match=r"videos\.two: .* have the same name"):
        find_video_sets({"two": second})


def test_prompts_are_not_split_dropped_or_mixed_up(tmp_path: Path) -> None:
    videos = folder(tmp_path / "videos", "a.mp4", "b.mp4")
    other = folder(tmp_path / "other", "a.mp4")
    prompt = "a red boat .\u2028the camera\u0085pans .\v\f"
    row = json.dumps({"name": "a", "prompt": prompt}, ensure_ascii=False)
    for name, text in {"p.jsonl": f"\ufeff{row}\r\n", "p.csv": f"name,prompt\na,{prompt}\n"}.items():
        (tmp_path / name).write_bytes(text.encode())
        assert read_prompts(tmp_path / name) == {"a": prompt}
    for text, message in {
        "name,prompt\na,one, two\n": "row 1: more cells than columns",
        'name,prompt\na,"one\nb,two\n': "cannot be read: unexpected end of data",
        "name,prompt\na,one\na.mp4,two\n": "row 2: a has another prompt in an earlier row",
        "name,prompt\nc,one\n": r"none of the 1 names in .* is that of a video",
    }.items():
        (tmp_path / "p.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            find_video_sets({"m": videos}, prompts=tmp_path / "p.csv")
    for place, words in ((videos, "one"), (other, "two")):
        (place / "a.json").write_text(json.dumps({"prompt": words}))
    with pytest.raises(ValueError, match=r"have different prompts for a; say which with --prompts FILE"):
        find_video_sets({"one": videos, "two": other})
