"""Reads what raters' browsers saved."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luve_lightning.studies.key import FORMAT, StudyKey

Choices = dict[tuple[int, str], int]
"""The method chosen, by trial and axis."""


@dataclass(frozen=True)
class RaterAnswers:
    """One rater's file.

    Attributes:
        rater: number, 1 or more.
        file: its name.
        choices: method chosen by trial and axis.
    """

    rater: int
    file: str
    choices: Choices


@dataclass(frozen=True)
class Answers:
    """All that was read.

    Attributes:
        raters: by number, ascending.
        notes: what a reader must know: incomplete files, files that say the same.
    """

    raters: tuple[RaterAnswers, ...]
    notes: tuple[str, ...]


def read_answers(folder: Path, key: StudyKey) -> Answers:
    """Read every JSON file of a folder.

    A rater who saved several times is counted once, with the file that holds most, provided that the others agree
    with it.

    Raises:
        FileNotFoundError: no such folder, or no JSON file in it.
        ValueError: a file is no answers, of another study, or contradicts another file of the same rater.
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
    return Answers(raters, tuple(notes))


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
        raise ValueError(
            f"answers: {file.name}: of another study ({content['study']}, the key is of {key.study})"
        )
    rater = content["rater"]
    if not isinstance(rater, int) or isinstance(rater, bool) or not 1 <= rater <= len(key.plans):
        raise ValueError(
            f"answers: {file.name}: rater {rater!r}, expected a number from 1 to {len(key.plans)}"
        )
    choices: Choices = {}
    if not isinstance(content["answers"], list):
        raise ValueError(f"answers: {file.name}: answers: expected a list")
    for answer in content["answers"]:
        choices |= _choices(file, answer, key, rater)
    return RaterAnswers(rater, file.name, choices)


def _choices(file: Path, answer: Any, key: StudyKey, rater: int) -> Choices:
    plan = key.plans[rater - 1]
    number = answer.get("trial") if isinstance(answer, dict) else None
    if (
        not isinstance(number, int)
        or not 1 <= number <= len(plan)
        or not isinstance(answer.get("choices"), dict)
    ):
        raise ValueError(
            f"answers: {file.name}: expected trial, from 1 to {len(plan)}, and choices, got {answer!r}"
        )
    files = key.files[plan[number - 1].item]
    found: Choices = {}
    for axis, chosen in answer["choices"].items():
        if axis not in key.axes or chosen not in files:
            raise ValueError(
                f"answers: {file.name}: trial {number}: {axis} {chosen!r} is not what was shown there"
            )
        found[number - 1, axis] = files.index(chosen)
    return found
