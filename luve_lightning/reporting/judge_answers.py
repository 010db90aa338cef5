"""A judge's answers: read exactly, told line by line what is wrong with them, averaged with intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luve_lightning.evaluation.bootstrap import mean_interval
from luve_lightning.evaluation.tables import Row
from luve_lightning.reporting.judge import AXES, HIGHEST, LOWEST, Key

VIDEO_COLUMNS = ("method", "video", *AXES, "reason")
MEAN_COLUMNS = ("method", "n", *(column for axis in AXES for column in (axis, f"{axis}_low", f"{axis}_high")))


@dataclass(frozen=True)
class JudgeAnswer:
    """What the judge said of one video.

    Attributes:
        scores: 1 to 10, by axis.
        reason: in its words; empty when it gave none.
        line: of the file, counted from 1.
    """

    scores: dict[str, int]
    reason: str
    line: int


@dataclass(frozen=True)
class JudgeAnswers:
    """Everything that a file of answers holds.

    Attributes:
        valid: by question id.
        problems: what was not counted, and questions without an answer, one line each.
    """

    valid: dict[str, JudgeAnswer]
    problems: list[str]


def read_answers(path: Path, key: Key) -> JudgeAnswers:
    """Read answers: a JSON object a line with "id", the three axes (whole numbers 1 to 10) and perhaps "reason".

    Nothing is guessed: what does not fit is not counted and named with its line, and reading goes on. Of several
    answers to one question the first valid one counts. Other keys and empty lines are ignored.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is not text, or holds not one valid answer.
    """
    if not path.is_file():
        raise FileNotFoundError(f"answers: {path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"answers: {path}: not UTF-8 text: {error}") from None
    valid: dict[str, JudgeAnswer] = {}
    problems = []
    # Not splitlines: it also splits at separators that may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            name, answer = _parse(line, number, key)
            if name in valid:
                raise ValueError(f"{name} was answered on line {valid[name].line} already")
        except ValueError as reason:
            problems.append(f"line {number}: {reason}")
        else:
            valid[name] = answer
    if not valid:
        first = f" ({problems[0]})" if problems else ""
        raise ValueError(f"answers: {path}: not one valid answer{first}")
    problems += [
        f"no answer for {name} ({entry.method}/{entry.video})"
        for name, entry in key.entries.items()
        if name not in valid
    ]
    problems += [f"not asked: {name}: {reason}" for name, reason in key.unreadable.items()]
    return JudgeAnswers(valid, problems)


def _parse(line: str, number: int, key: Key) -> tuple[str, JudgeAnswer]:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {_short(content)}")
    name = content.get("id")
    if not isinstance(name, str) or name not in key.entries:
        raise ValueError(f"unknown id {_short(name)}" if "id" in content else "no id")
    scores = {}
    for axis in AXES:
        if axis not in content:
            raise ValueError(f"{name}: no {axis}")
        scores[axis] = _score(content[axis], f"{name}: {axis}")
    reason = content.get("reason")
    return name, JudgeAnswer(scores, reason if isinstance(reason, str) else "", number)


def _score(value: Any, where: str) -> int:
    """A whole number in range; 7.0 is one, "7", true and 7.5 are none."""
    whole = (isinstance(value, float) and value.is_integer()) or type(value) is int
    if not whole or not LOWEST <= value <= HIGHEST:
        raise ValueError(f"{where}: expected a whole number from {LOWEST} to {HIGHEST}, got {_short(value)}")
    return int(value)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def video_rows(answers: JudgeAnswers, key: Key) -> list[Row]:
    """One row a judged video, with the keys VIDEO_COLUMNS; by method, then by name."""
    rows: list[Row] = [
        {"method": key.entries[name].method, "video": key.entries[name].video}
        | answer.scores
        | {"reason": answer.reason}
        for name, answer in answers.valid.items()
    ]
    return sorted(rows, key=lambda row: (str(row["method"]), str(row["video"])))


def mean_rows(rows: Sequence[Row], seed: int, replicates: int = 1000) -> list[Row]:
    """Mean of each method and axis with its 95 % bootstrap interval over videos, with the keys MEAN_COLUMNS.

    Args:
        rows: of `video_rows`.
        seed: of the bootstrap.
        replicates: how often the videos are drawn anew.
    """
    table: list[Row] = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        cells: dict[str, Any] = {"method": method, "n": len(own)}
        for axis in AXES:
            values = mean_interval([float(row[axis]) for row in own], seed, replicates)
            cells |= dict(zip((axis, f"{axis}_low", f"{axis}_high"), values, strict=True))
        table.append(cells)
    return table
