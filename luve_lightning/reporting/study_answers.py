"""Raters' answers: reading the files that browsers saved, shares with intervals, and consistency."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luve_lightning.evaluation.bootstrap import draw_counts, percentiles
from luve_lightning.evaluation.tables import Row
from luve_lightning.reporting.study import FORMAT, StudyKey

Choices = dict[tuple[int, str], int]
"""The method chosen, by trial and axis."""


@dataclass(frozen=True)
class RaterAnswers:
    """One rater's file.

    Attributes:
        rater: number, 1 or more.
        file: its name.
        choices: chosen method by trial and axis.
    """

    rater: int
    file: str
    choices: Choices


@dataclass(frozen=True)
class StudyAnswers:
    """Everything that was read.

    Attributes:
        raters: raters by number, ascending.
        notes: what a reader must know: incomplete files, duplicate files.
    """

    raters: tuple[RaterAnswers, ...]
    notes: tuple[str, ...]


def read_answers(folder: Path, key: StudyKey) -> StudyAnswers:
    """Read every JSON file of a folder.

    A rater who saved several times counts once, with the file that holds most, provided that the others agree with
    it.

    Raises:
        FileNotFoundError: no such folder, or no JSON file in it.
        ValueError: a file is not a rater's answers, belongs to another study, or contradicts another file of the
            same rater.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"answers: {folder}: no such folder")
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"answers: {folder}: no .json file there")
    by_rater: dict[int, RaterAnswers] = {}
    notes = []
    for file in files:
        found = _read(file, key)
        before = by_rater.get(found.rater)
        if before is not None:
            notes.append(_same_rater(before, found))
        if before is None or len(found.choices) > len(before.choices):
            by_rater[found.rater] = found
    raters = tuple(by_rater[number] for number in sorted(by_rater))
    for rater in raters:
        expected = len(key.plans[rater.rater - 1]) * len(key.axes)
        if len(rater.choices) < expected:
            notes.append(
                f"{rater.file}: incomplete: rater {rater.rater} answered {len(rater.choices)} of {expected} "
                "questions; these are used"
            )
    return StudyAnswers(raters, tuple(notes))


def _same_rater(first: RaterAnswers, second: RaterAnswers) -> str:
    shared = first.choices.keys() & second.choices.keys()
    if any(first.choices[question] != second.choices[question] for question in shared):
        raise ValueError(
            f"answers: {first.file} and {second.file} are both of rater {first.rater} and differ; remove one of them"
        )
    return f"{first.file} and {second.file} are both of rater {first.rater} and agree: counted once"


def _read(file: Path, key: StudyKey) -> RaterAnswers:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"answers: {file.name}: not JSON: {error}") from None
    if not isinstance(content, dict) or not {"format", "study", "rater", "answers"} <= content.keys():
        raise ValueError(f"answers: {file.name}: not what the study's page saves")
    if content["format"] != FORMAT:
        raise ValueError(f"answers: {file.name}: format {content['format']}, expected {FORMAT}")
    if content["study"] != key.study:
        raise ValueError(f"answers: {file.name}: of another study ({content['study']}, the key is of {key.study})")
    rater = content["rater"]
    if not isinstance(rater, int) or isinstance(rater, bool) or not 1 <= rater <= len(key.plans):
        raise ValueError(f"answers: {file.name}: rater {rater!r}, expected a number from 1 to {len(key.plans)}")
    choices: Choices = {}
    if not isinstance(content["answers"], list):
        raise ValueError(f"answers: {file.name}: answers: expected a list")
    for answer in content["answers"]:
        choices |= _choices(file, answer, key, rater)
    return RaterAnswers(rater, file.name, choices)


def _choices(file: Path, answer: Any, key: StudyKey, rater: int) -> Choices:
    plan = key.plans[rater - 1]
    number = answer.get("trial") if isinstance(answer, dict) else None
    if not isinstance(number, int) or not 1 <= number <= len(plan) or not isinstance(answer.get("choices"), dict):
        raise ValueError(f"answers: {file.name}: expected trial, from 1 to {len(plan)}, and choices, got {answer!r}")
    files = key.files[plan[number - 1].item]
    found: Choices = {}
    for axis, chosen in answer["choices"].items():
        if axis not in key.axes or chosen not in files:
            raise ValueError(f"answers: {file.name}: trial {number}: {axis} {chosen!r} is not what was shown there")
        found[number - 1, axis] = files.index(chosen)
    return found


SHARE_COLUMNS = ("raters", "axis", "method", "share", "low", "high", "answers", "n_raters", "n_items")
RATER_COLUMNS = ("rater", "file", "answered", "of", "repeated", "consistency", "flagged")
_HOW = (
    "Shares of first choices in percent, each item counted once per rater (its first showing). 95 % intervals: "
    "percentile bootstrap in which raters and items are both drawn with replacement, independently of each other; an "
    "answer counts as often as its rater was drawn times as often as its item was. A method that nobody chose has the "
    "interval 0 to 0, which says little. Consistency is the share of repeated questions at which a rater chose the "
    "same method again; by chance {chance:.2f} with {methods} methods."
)

_NONE = -1


@dataclass(frozen=True)
class RaterQuality:
    """How consistent a rater is.

    Attributes:
        answers: number of answers.
        expected: number of questions asked.
        repeated: number of questions asked and answered twice.
        consistency: share of these with the same method both times; NaN for none.
        flagged: whether that is below the threshold.
    """

    answers: RaterAnswers
    expected: int
    repeated: int
    consistency: float
    flagged: bool


def rate_raters(answers: StudyAnswers, key: StudyKey, threshold: float) -> list[RaterQuality]:
    """The consistency of each rater; one without repeated answers is not flagged.

    Raises:
        ValueError: a threshold outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a share from 0 to 1, got {threshold}")
    return [_quality(rater, key, threshold) for rater in answers.raters]


def _quality(rater: RaterAnswers, key: StudyKey, threshold: float) -> RaterQuality:
    plan = key.plans[rater.rater - 1]
    pairs = [
        (rater.choices[trial.first, axis], rater.choices[number, axis])
        for number, trial in enumerate(plan)
        for axis in key.axes
        if trial.first is not None and (trial.first, axis) in rater.choices and (number, axis) in rater.choices
    ]
    consistency = float(np.mean([first == second for first, second in pairs])) if pairs else float("nan")
    expected = len(plan) * len(key.axes)
    return RaterQuality(rater, expected, len(pairs), consistency, bool(consistency < threshold))


def share_rows(raters: Sequence[RaterAnswers], key: StudyKey, label: str, seed: int, replicates: int) -> list[Row]:
    """The share of each method on each axis, one row each, in percent; `label` names the raters in their column.

    Raises:
        ValueError: replicates below 1.
    """
    rows: list[Row] = []
    for axis in key.axes:
        chosen = choice_matrix(raters, key, axis)
        answered = chosen != _NONE
        total = int(answered.sum())
        used = (int(answered.any(axis=1).sum()), int(answered.any(axis=0).sum()))
        for number, method in enumerate(key.methods):
            low, high = _interval(chosen, number, seed, replicates) if total else (float("nan"), float("nan"))
            share = 100 * float((chosen == number).sum()) / total if total else float("nan")
            values = (label, axis, method, share, low, high, total, *used)
            rows.append(dict(zip(SHARE_COLUMNS, values, strict=True)))
    return rows


def choice_matrix(raters: Sequence[RaterAnswers], key: StudyKey, axis: str) -> NDArray[np.int64]:
    """Raters x items: the method chosen when the item was first shown, -1 for no answer."""
    chosen = np.full((len(raters), len(key.items)), _NONE, dtype=np.int64)
    for line, rater in enumerate(raters):
        for number, trial in enumerate(key.plans[rater.rater - 1]):
            if trial.first is None:
                chosen[line, trial.item] = rater.choices.get((number, axis), _NONE)
    return chosen


def _interval(chosen: NDArray[np.int64], method: int, seed: int, replicates: int) -> tuple[float, float]:
    """Both ends in percent; NaN where fewer than two raters or items gave answers."""
    answered = chosen != _NONE
    # Raters and items without any answer are not part of the sample.
    chosen = chosen[answered.any(axis=1)][:, answered.any(axis=0)]
    answered = chosen != _NONE
    raters = draw_counts(chosen.shape[0], 2 * seed, replicates).astype(np.float64)
    items = draw_counts(chosen.shape[1], 2 * seed + 1, replicates).astype(np.float64)
    hits = ((raters @ (chosen == method)) * items).sum(axis=1)
    totals = ((raters @ answered) * items).sum(axis=1)
    draws = 100 * hits[totals > 0] / totals[totals > 0]  # a draw may miss every answer of a sparse study
    return percentiles(draws, min(chosen.shape)) if len(draws) else (float("nan"), float("nan"))


def rater_rows(qualities: Sequence[RaterQuality]) -> list[Row]:
    """One row per rater, by RATER_COLUMNS."""
    return [
        {
            "rater": quality.answers.rater,
            "file": quality.answers.file,
            "answered": len(quality.answers.choices),
            "of": quality.expected,
            "repeated": quality.repeated,
            "consistency": quality.consistency,
            "flagged": "yes" if quality.flagged else "no",
        }
        for quality in qualities
    ]


def how(key: StudyKey) -> str:
    """How shares and intervals were computed, in words."""
    return _HOW.format(chance=1 / len(key.methods), methods=len(key.methods))
