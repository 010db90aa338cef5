"""From answers to shares: how often each method was chosen, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from luve_lightning.evaluation.bootstrap import draw_counts, percentiles
from luve_lightning.evaluation.tables import Row
from luve_lightning.studies.answers import Answers, RaterAnswers
from luve_lightning.studies.key import StudyKey

SHARE_COLUMNS = ("raters", "axis", "method", "share", "low", "high", "answers", "n_raters", "n_items")
RATER_COLUMNS = ("rater", "file", "answered", "of", "repeated", "consistency", "flagged")
HOW = (
    "Shares of first choices in percent, each item counted once a rater (its first showing). 95 % intervals: "
    "percentile bootstrap in which raters and items are both drawn with replacement, independently of each other; an "
    "answer counts as often as its rater was drawn times as often as its item was. A method that nobody chose has the "
    "interval 0 to 0, which says little. Consistency is the share of repeated questions at which a rater chose the "
    "same method again; by chance {chance:.2f} with {methods} methods."
)

_NONE = -1


@dataclass(frozen=True)
class RaterQuality:
    """How steady a rater is.

    Attributes:
        answers: of the rater.
        expected: questions asked.
        repeated: questions that were asked, and answered, twice.
        consistency: share of these with the same method both times; NaN for none.
        flagged: whether that is below the threshold.
    """

    answers: RaterAnswers
    expected: int
    repeated: int
    consistency: float
    flagged: bool


def rate_raters(answers: Answers, key: StudyKey, threshold: float) -> list[RaterQuality]:
    """The consistency of each rater; one without repeated answers is not flagged.

    Raises:
        ValueError: a threshold that is no share.
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
        if trial.first is not None
        and (trial.first, axis) in rater.choices
        and (number, axis) in rater.choices
    ]
    consistency = float(np.mean([first == second for first, second in pairs])) if pairs else float("nan")
    expected = len(plan) * len(key.axes)
    return RaterQuality(rater, expected, len(pairs), consistency, bool(consistency < threshold))


def share_rows(
    raters: Sequence[RaterAnswers], key: StudyKey, label: str, seed: int, replicates: int
) -> list[Row]:
    """The share of each method on each axis, one row each, in percent.

    Args:
        raters: whose answers count.
        key: of the study.
        label: for the column `raters`: which raters these are.
        seed: of the bootstrap.
        replicates: resamples.

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
    """Raters x items: the method chosen when the item was shown first, -1 for no answer."""
    chosen = np.full((len(raters), len(key.items)), _NONE, dtype=np.int64)
    for line, rater in enumerate(raters):
        for number, trial in enumerate(key.plans[rater.rater - 1]):
            if trial.first is None:
                chosen[line, trial.item] = rater.choices.get((number, axis), _NONE)
    return chosen


def _interval(chosen: NDArray[np.int64], method: int, seed: int, replicates: int) -> tuple[float, float]:
    """Both ends in percent; NaN where fewer than two raters or items gave answers."""
    answered = chosen != _NONE
    # Who and what gave no answer at all is not part of the sample.
    chosen = chosen[answered.any(axis=1)][:, answered.any(axis=0)]
    answered = chosen != _NONE
    raters = draw_counts(chosen.shape[0], 2 * seed, replicates).astype(np.float64)
    items = draw_counts(chosen.shape[1], 2 * seed + 1, replicates).astype(np.float64)
    hits = ((raters @ (chosen == method)) * items).sum(axis=1)
    totals = ((raters @ answered) * items).sum(axis=1)
    draws = 100 * hits[totals > 0] / totals[totals > 0]  # a draw may miss every answer of a sparse study
    return percentiles(draws, min(chosen.shape)) if len(draws) else (float("nan"), float("nan"))


def rater_rows(qualities: Sequence[RaterQuality]) -> list[Row]:
    """One row a rater, by RATER_COLUMNS."""
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
    return HOW.format(chance=1 / len(key.methods), methods=len(key.methods))
