"""The key of a study: which file is of which method, and what each rater was shown. Not for raters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luve_lightning.files import write_text
from luve_lightning.studies.design import Trial

FORMAT = 1


@dataclass(frozen=True)
class StudyKey:
    """What turns answers into preferences.

    Attributes:
        study: random id that answers carry too.
        methods: their names.
        axes: names of the questions.
        items: name of each item (of its videos' files).
        files: random name of the video of each item and method.
        plans: the trials of each rater; rater 1 is the first.
        seed: that everything was drawn from.
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
        ValueError: it is no key.
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
