"""From answers to shares, with raters whose taste is known."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning.reporting.study import StudyKey, write_key
from luve_lightning.reporting.study_answers import StudyAnswers, rate_raters, read_answers, share_rows
from tests.helpers.run_luve import run_luve
from tests.helpers.studies import METHODS, make_key, prefers, rater_file, steady, write_answers


def read(folder: Path, key: StudyKey, contents: dict[str, dict[str, Any]]) -> StudyAnswers:
    return read_answers(write_answers(folder, contents), key)


def shares(key: StudyKey, answers: StudyAnswers, **options: int) -> dict[tuple[str, str], dict[str, Any]]:
    rows = share_rows(answers.raters, key, "all", **{"seed": 0, "replicates": 300, **options})
    return {(str(row["axis"]), str(row["method"])): dict(row) for row in rows}


def test_a_known_preference_is_found_and_its_interval_holds_it(tmp_path: Path) -> None:
    key = make_key(items=30, raters=12, repeats=3)
    contents = {f"r{n}": rater_file(key, n, prefers(2, 0.6)) for n in range(1, 13)}
    found = shares(key, read(tmp_path, key, contents))
    for axis in key.axes:
        row = found[axis, METHODS[2]]
        assert row["low"] < 60 < row["high"]
        assert row["low"] < row["share"] < row["high"]
        assert row["high"] - row["low"] < 25
        assert (row["answers"], row["n_raters"], row["n_items"]) == (360, 12, 30), "repetitions do not count"
        assert sum(found[axis, method]["share"] for method in METHODS) == pytest.approx(100)
        assert all(found[axis, method]["high"] < 30 for method in METHODS if method != METHODS[2])


def test_the_share_is_that_of_a_plain_count(tmp_path: Path) -> None:
    key = make_key(items=5, raters=3, repeats=2)
    answers = read(tmp_path, key, {f"r{n}": rater_file(key, n, prefers(0, 0.3)) for n in (1, 2, 3)})
    counted = 0
    for rater in answers.raters:
        for number, trial in enumerate(key.plans[rater.rater - 1]):
            counted += trial.first is None and rater.choices[number, "details"] == 0
    assert shares(key, answers)["details", METHODS[0]]["share"] == pytest.approx(100 * counted / 15)


def test_the_interval_is_wider_when_raters_agree_with_themselves_only(tmp_path: Path) -> None:
    """Each rater always chooses a method of their own: items say nothing, the few raters are what is sure."""
    key = make_key(items=40, raters=6, repeats=0)
    by_person = {f"r{n}": rater_file(key, n, prefers(n % 2, 1.0)) for n in range(1, 7)}
    by_chance = {f"r{n}": rater_file(key, n, lambda i, a, rng: int(rng.integers(2))) for n in range(1, 7)}
    people = shares(key, read(tmp_path / "a", key, by_person))["overall", METHODS[0]]
    chance = shares(key, read(tmp_path / "b", key, by_chance))["overall", METHODS[0]]
    assert people["share"] == 50
    assert people["high"] - people["low"] > 50 > chance["high"] - chance["low"]


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(4)), st.integers(0, 100))
def test_methods_by_other_numbers_have_the_same_shares(order: list[int], seed: int) -> None:
    key = make_key(items=4, raters=3, repeats=1, seed=seed)
    files = tuple(tuple(files[m] for m in order) for files in key.files)
    back = [order.index(m) for m in range(4)]
    plans = tuple(
        tuple(replace(trial, order=tuple(back[m] for m in trial.order)) for trial in plan) for plan in key.plans
    )
    other = replace(key, methods=tuple(key.methods[m] for m in order), files=files, plans=plans)
    contents = [rater_file(key, n, prefers(1, 0.5), seed) for n in (1, 2, 3)]
    assert _shares_of(key, contents) == _shares_of(other, contents)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 1000))
def test_positions_and_the_order_of_items_change_nothing(seed: int) -> None:
    """The same steady tastes in two studies that were drawn otherwise."""
    first, second = make_key(5, 3, 2, seed=0), make_key(5, 3, 2, seed=seed)
    tastes = [steady(n, 0.5) for n in range(3)]
    contents = [[rater_file(key, n + 1, taste) for n, taste in enumerate(tastes)] for key in (first, second)]
    assert _shares_of(first, contents[0]) == _shares_of(second, contents[1])


def _shares_of(key: StudyKey, contents: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[float, float, float]]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        answers = read(Path(folder), key, {f"r{number}": content for number, content in enumerate(contents)})
    return {place: (row["share"], row["low"], row["high"]) for place, row in shares(key, answers).items()}


def test_raters_who_contradict_themselves_are_flagged(tmp_path: Path) -> None:
    key = make_key(items=30, raters=4, repeats=10)
    contents = {
        "a": rater_file(key, 1, steady(0, 0.7)),
        "b": rater_file(key, 2, lambda item, axis, rng: int(rng.integers(4))),
        "c": rater_file(key, 3, steady(1, 0.5)),
        "d": rater_file(key, 4, steady(1, 0.5), until=1),
    }
    answers = read(tmp_path, key, contents)
    found = rate_raters(answers, key, 0.5)
    assert [quality.flagged for quality in found] == [False, True, False, False]
    assert [quality.repeated for quality in found] == [40, 40, 40, 0]
    assert found[0].consistency == 1
    assert 0.05 < found[1].consistency < 0.5
    assert math.isnan(found[3].consistency)


def test_one_rater_has_shares_without_an_interval(tmp_path: Path) -> None:
    key = make_key(items=8, raters=2, repeats=0)
    row = shares(key, read(tmp_path, key, {"a": rater_file(key, 2, prefers(3, 1.0))}))["text", METHODS[3]]
    assert (row["share"], row["n_raters"]) == (100, 1)
    assert math.isnan(row["low"])


@pytest.fixture
def study(tmp_path: Path) -> StudyKey:
    key = make_key(items=10, raters=3, repeats=4)
    write_key(key, tmp_path / "key.json")
    return key


def tally(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> Any:
    return run_luve(capsys, "study", "tally", f"--answers={folder / 'answers'}", f"--key={folder / 'key.json'}",
                    f"--output={folder / 'out'}", "--replicates=50", *words)  # fmt: skip


def test_the_command_writes_tables_with_and_without_flagged_raters(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, study: StudyKey
) -> None:
    full = rater_file(study, 1, steady(0, 0.8))
    part = {**full, "answers": full["answers"][:3]}
    contents = {
        "one": full,
        "one-early": part,
        "two": rater_file(study, 2, lambda item, axis, rng: int(rng.integers(4)), seed=3),
        "three": rater_file(study, 3, steady(0, 0.8), until=6),
    }
    write_answers(tmp_path / "answers", contents)
    outcome = tally(capsys, tmp_path)
    assert outcome.code == 0, outcome.err
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * 4
    assert {(row["raters"], row["n_raters"]) for row in rows} == {("all", "3"), ("without flagged", "2")}
    with (tmp_path / "out" / "raters.csv").open(newline="") as file:
        assert [(row["rater"], row["file"], row["flagged"]) for row in csv.DictReader(file)] == [
            ("1", "one.json", "no"),
            ("2", "two.json", "yes"),
            ("3", "three.json", "no"),
        ]
    markdown = (tmp_path / "out" / "table.md").read_text()
    for text in (outcome.out, markdown):
        assert "one-early.json and one.json are both of rater 1 and agree: counted once" in text
        assert "three.json: incomplete: rater 3 answered 24 of 56 questions; these are used" in text
        assert "rater 2 is flagged: the same choice at" in text
        assert "raters and items are both drawn with replacement" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"study": "other"}, "a.json: of another study (other, the key is of study0)"),
        ({"rater": 9}, "a.json: rater 9, expected a number from 1 to 3"),
        ({"format": 7}, "a.json: format 7, expected 1"),
        ({"answers": None}, "a.json: answers: expected a list"),
        ({"answers": [{"trial": 99, "choices": {}}]}, "a.json: expected trial, from 1 to 14"),
        (
            {"answers": [{"trial": 1, "choices": {"overall": "x.mp4"}}]},
            "a.json: trial 1: overall 'x.mp4' is not what was",
        ),
    ],
)
def test_wrong_answers_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, study: StudyKey, change: dict[str, Any], message: str
) -> None:
    write_answers(tmp_path / "answers", {"a": {**rater_file(study, 1, prefers(0, 1.0)), **change}})
    outcome = tally(capsys, tmp_path)
    assert outcome.code == 2
    (line,) = outcome.error_lines
    assert message in line
    assert not (tmp_path / "out").exists()


def test_two_files_of_one_rater_that_differ_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, study: StudyKey
) -> None:
    write_answers(tmp_path / "answers", {n: rater_file(study, 2, prefers(0, 0.5), seed=len(n)) for n in ("a", "bb")})
    outcome = tally(capsys, tmp_path)
    assert outcome.code == 2
    assert "a.json and bb.json are both of rater 2 and differ; remove one of them" in outcome.err


def test_files_that_are_no_answers_or_no_key(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, study: StudyKey
) -> None:
    assert "answers: " in tally(capsys, tmp_path).err
    (tmp_path / "answers").mkdir()
    assert "no .json file there" in tally(capsys, tmp_path).err
    (tmp_path / "answers" / "a.json").write_text("{")
    assert "a.json: not JSON" in tally(capsys, tmp_path).err
    (tmp_path / "answers" / "a.json").write_text("[1]")
    assert "a.json: not what the study's page saves" in tally(capsys, tmp_path).err
    content = json.loads((tmp_path / "key.json").read_text())
    del content["files"]
    (tmp_path / "key.json").write_text(json.dumps(content))
    assert "not a key of `luve study build`: KeyError 'files'" in tally(capsys, tmp_path).err


def test_a_threshold_is_a_share(capsys: pytest.CaptureFixture[str], tmp_path: Path, study: StudyKey) -> None:
    write_answers(tmp_path / "answers", {"a": rater_file(study, 1, prefers(0, 1.0))})
    assert "threshold: expected a share from 0 to 1, got 2" in tally(capsys, tmp_path, "--threshold=2").err


def test_a_verb_of_two_words_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_luve(capsys, "study", "--help")
    assert outcome.code == 0
    assert "study build" in outcome.out
    assert "study tally" in outcome.out
    helped = run_luve(capsys, "study", "tally", "--help")
    assert helped.out.startswith("usage: luve study tally [--config FILE]")


def test_the_seed_changes_the_interval_only(tmp_path: Path) -> None:
    key = make_key(items=10, raters=5, repeats=0)
    answers = read(tmp_path, key, {f"r{n}": rater_file(key, n, prefers(0, 0.5)) for n in range(1, 6)})
    one, same, other = (shares(key, answers, seed=seed)["overall", METHODS[0]] for seed in (0, 0, 1))
    assert one == same
    assert one["share"] == other["share"]
    assert (one["low"], one["high"]) != (other["low"], other["high"])
    assert np.isfinite([one["low"], other["low"]]).all()
