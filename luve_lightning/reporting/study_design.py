"""Who sees what where: for each rater, the order of a study's items and the positions of its methods.

The paper shows 60 videos to 20 raters in 2x2 grids of four methods and reports how often its own was preferred overall,
in details, in temporal quality and in following the text (LuVe, arXiv 2602.11564). How positions were drawn and whether
items were repeated is not known; both are choices here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luve_lightning.files import write_text

AXES = {
    "overall": "Which video do you like best overall?",
    "details": "Which has the richest and cleanest fine detail?",
    "temporal": "Which moves most naturally, without flicker or jumps?",
    "text": "Which follows the text best?",
}
"""What is asked of each grid. The names are the paper's, the words ours."""

POSITIONS = "ABCDEFGHI"
_GAP = 4  # trials between an item and its repetition, where the study is long enough


@dataclass(frozen=True)
class Trial:
    """One grid of videos that a rater sees.

    Attributes:
        item: number of the item.
        order: numbers of the methods, position by position.
        first: number of the earlier trial with the same item; None unless it is a repetition.
    """

    item: int
    order: tuple[int, ...]
    first: int | None = None


def plan_rater(items: int, methods: int, repeats: int, rng: np.random.Generator) -> list[Trial]:
    """The trials of one rater.

    Every item comes once, in random order. Over these, each method is at each position equally often, to within
    one. Some items come again later, with every method at another position.

    Args:
        items: at least 1.
        methods: at least 2.
        repeats: number of items that come again; at most `items`.
        rng: draws everything.
    """
    sequence = rng.permutation(items).tolist()
    orders = dict(zip(sequence, _balanced_orders(items, methods, rng), strict=True))
    # Repeat items of the first half first: they leave room for others between.
    early = rng.permutation(sequence[: max(1, items // 2)]).tolist()
    late = rng.permutation(sequence[max(1, items // 2) :]).tolist()
    for item in (early + late)[:repeats]:
        sequence.insert(_place_again(sequence, item, rng), item)
    trials: list[Trial] = []
    for item in sequence:
        before = next((number for number, trial in enumerate(trials) if trial.item == item), None)
        order = orders[item] if before is None else _moved(trials[before].order, rng)
        trials.append(Trial(item, order, before))
    return trials


def _place_again(sequence: Sequence[int], item: int, rng: np.random.Generator) -> int:
    """Position in the sequence where an item comes again."""
    earliest = sequence.index(item) + 1 + _GAP
    return int(rng.integers(min(earliest, len(sequence)), len(sequence) + 1))


def _balanced_orders(items: int, methods: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Blocks of random Latin squares: in each, every method is once at every position."""
    found: list[tuple[int, ...]] = []
    cyclic = (np.arange(methods)[:, None] + np.arange(methods)) % methods
    for _ in range(math.ceil(items / methods)):
        symbols = rng.permutation(methods)
        square = symbols[cyclic[rng.permutation(methods)][:, rng.permutation(methods)]]
        found += [tuple(int(method) for method in row) for row in square]
    return found[:items]


def _moved(order: Sequence[int], rng: np.random.Generator) -> tuple[int, ...]:
    """The same methods, each at another position."""
    while True:
        again = rng.permutation(order)
        if (again != np.asarray(order)).all():
            return tuple(int(method) for method in again)


FORMAT = 1


@dataclass(frozen=True)
class StudyKey:
    """What turns answers into preferences.

    Attributes:
        study: random id, also part of the answers.
        methods: names of the methods.
        axes: names of the questions.
        items: name of each item (of its videos' files).
        files: random file name for each item and method.
        plans: trials of each rater; rater 1 is the first.
        seed: seed of everything drawn.
    """

    study: str
    methods: tuple[str, ...]
    axes: tuple[str, ...]
    items: tuple[str, ...]
    files: tuple[tuple[str, ...], ...]
    plans: tuple[tuple[Trial, ...], ...]
    seed: int


def write_key(key: StudyKey, path: Path) -> None:
    """Write a key as JSON, in words that a person can follow."""
    positions = [
        [
            {
                "item": key.items[trial.item],
                "methods": [key.methods[method] for method in trial.order],
                "files": [key.files[trial.item][method] for method in trial.order],
                **({} if trial.first is None else {"repeats_trial": trial.first + 1}),
            }
            for trial in plan
        ]
        for plan in key.plans
    ]
    content = {
        "what": "Key of a human study: which video is which method. Keep it from the raters.",
        "format": FORMAT,
        "study": key.study,
        "seed": key.seed,
        "methods": key.methods,
        "axes": key.axes,
        "items": key.items,
        "files": {
            name: dict(zip(key.methods, files, strict=True))
            for name, files in zip(key.items, key.files, strict=True)
        },
        "raters": {str(number): plan for number, plan in enumerate(positions, 1)},
    }
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_key(path: Path) -> StudyKey:
    """Read a key.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a key.
    """
    if not path.is_file():
        raise FileNotFoundError(f"key: {path}: no such file; `luve study build` writes it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"key: {path}: not JSON: {error}") from None
    try:
        return _key(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"key: {path}: not a key of `luve study build`: {type(error).__name__} {error}"
        ) from None


def _key(content: dict[str, Any]) -> StudyKey:
    if content["format"] != FORMAT:
        raise ValueError(f"of format {content['format']}, expected {FORMAT}")
    methods, items = tuple(content["methods"]), tuple(content["items"])
    numbers = {method: number for number, method in enumerate(methods)}
    plans = []
    for rater in range(1, len(content["raters"]) + 1):
        trials = []
        for trial in content["raters"][str(rater)]:
            first = trial.get("repeats_trial")
            order = tuple(numbers[method] for method in trial["methods"])
            trials.append(Trial(items.index(trial["item"]), order, None if first is None else first - 1))
        plans.append(tuple(trials))
    files = tuple(tuple(content["files"][item][method] for method in methods) for item in items)
    return StudyKey(
        content["study"], methods, tuple(content["axes"]), items, files, tuple(plans), content["seed"]
    )
