"""Folders of videos matched by name, and their prompts."""

from __future__ import annotations

import json
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
    with pytest.raises(ValueError, match=r"'a\|b': a method's name"):
        find_video_sets({"a|b": videos})
