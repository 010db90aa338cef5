"""A judge's answers: nothing guessed, everything told."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning.evaluation.bootstrap import mean_interval
from luve_lightning.reporting.judge import (
    AXES,
    MEAN_COLUMNS,
    VIDEO_COLUMNS,
    JudgeAnswers,
    Key,
    KeyEntry,
    mean_rows,
    read_answers,
    video_rows,
)

KEY = Key(
    {f"id{n}": KeyEntry(method, video, "a boat") for n, (method, video) in enumerate(
        (method, video) for method in ("b", "a") for video in ("y", "x", "z"))},
    {"a/w": "w.mp4: cut short"},
)  # fmt: skip


def answer(name: object, scores: tuple[object, object, object] = (7, 8, 9), **more: object) -> str:
    return json.dumps({"id": name} | dict(zip(AXES, scores, strict=True)) | more)


def read(folder: Path, *lines: str) -> JudgeAnswers:
    path = folder / "answers.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_answers(path, KEY)


def test_good_answers_are_read(tmp_path: Path) -> None:
    lines = [answer(name) for name in KEY.entries]
    lines[1] = answer("id1", (1, 10, 5.0), reason='sharp,\u2028but "odd"', model="x")
    found = read(tmp_path, *lines)
    assert found.problems == ["not asked: a/w: w.mp4: cut short"]
    assert found.valid["id1"].scores == {"realism": 1, "detail": 10, "alignment": 5}
    assert found.valid["id1"].reason == 'sharp,\u2028but "odd"'
    assert all(isinstance(score, int) for score in found.valid["id1"].scores.values())


def test_whatever_does_not_fit_is_told_by_line_and_reading_goes_on(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        answer("id0"),
        "",
        "Here is my answer:",
        answer("id7"),
        answer("id1", (0, 5, 5)),
        answer("id1", (5, 11, 5)),
        answer("id1", (5, 5, "7")),
        answer("id1", (7.5, 5, 5)),
        answer("id1", (True, 5, 5)),
        answer("id1", (None, 5, 5)),
        '{"id": "id1", "realism": NaN, "detail": 5, "alignment": 5}',
        '{"id": "id1", "realism": 1e999, "detail": 5, "alignment": 5}',
        '{"id": "id1", "realism": 5, "detail": 5}',
        '{"realism": 5, "detail": 5, "alignment": 5}',
        answer(["id1"]),
        "[1, 2]",
        answer("id0", (1, 1, 1)),
        answer("id1", (10**400, 5, 5)),
        "[" * 100_000,
        answer("id1", (2, 3, 4)),
        *(answer(f"id{n}") for n in (2, 3, 4)),
    )
    told = dict(problem.split(": ", 1) for problem in found.problems[:-2])
    assert list(told) == [f"line {n}" for n in range(3, 20)]
    assert told["line 3"].startswith("not JSON: ")
    assert told["line 4"] == 'unknown id "id7"'
    scale = "expected a whole number from 1 to 10, got"
    for line, message in (
        (5, f"id1: realism: {scale} 0"), (6, f"id1: detail: {scale} 11"), (7, f'id1: alignment: {scale} "7"'),
        (8, f"id1: realism: {scale} 7.5"), (9, f"id1: realism: {scale} true"), (10, f"id1: realism: {scale} null"),
        (11, f"id1: realism: {scale} NaN"), (12, f"id1: realism: {scale} Infinity"), (13, "id1: no alignment"),
        (14, "no id"), (15, 'unknown id ["id1"]'), (16, "expected a JSON object, got [1, 2]"),
        (17, "id0 was answered on line 1 already"), (18, f"id1: realism: {scale} 1{36 * '0'}..."),
    ):  # fmt: skip
        assert told[f"line {line}"] == message
    assert told["line 19"].startswith("not JSON: ")
    assert found.problems[-2:] == ["no answer for id5 (a/z)", "not asked: a/w: w.mp4: cut short"]
    assert found.valid["id0"].scores["realism"] == 7, "the first answer counts"
    assert found.valid["id1"].scores == {"realism": 2, "detail": 3, "alignment": 4}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=6))
def test_any_text_is_survived(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes("\n".join([answer("id3"), *lines]).encode("utf-8", "replace"))
    found = read_answers(path, KEY)
    assert list(found.valid) == ["id3"]
    assert all("\n" not in problem for problem in found.problems)


def test_rows_and_means(tmp_path: Path) -> None:
    scores = [(1, 2, 3), (4, 5, 6), (9, 9, 9), (10, 1, 5)]
    found = read(tmp_path, *(answer(f"id{n}", triple) for n, triple in enumerate(scores)))
    rows = video_rows(found, KEY)
    assert all(tuple(row) == VIDEO_COLUMNS for row in rows)
    assert [(row["method"], row["video"], row["realism"]) for row in rows] == [
        ("a", "y", 10), ("b", "x", 4), ("b", "y", 1), ("b", "z", 9),
    ]  # fmt: skip
    only, several = mean_rows(rows, seed=3, replicates=500)
    assert tuple(only) == tuple(several) == MEAN_COLUMNS
    assert (only["method"], only["n"], only["realism"]) == ("a", 1, 10)
    assert math.isnan(only["realism_low"])
    assert (several["n"], several["realism"]) == (3, pytest.approx(14 / 3))
    assert (several["detail"], several["detail_low"], several["detail_high"]) == mean_interval([5, 2, 9], 3, 500)


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"answers: nowhere.jsonl: no such file"):
        read_answers(Path("nowhere.jsonl"), KEY)
    with pytest.raises(ValueError, match=r'not one valid answer \(line 1: unknown id "x"\)'):
        read(tmp_path, answer("x"))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_answers(tmp_path / "bytes.jsonl", KEY)
