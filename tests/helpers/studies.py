"""Small studies for the tests: videos of plain colours, a study of them, and raters with a known taste."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from luve_lightning.data.video_files import write_video
from luve_lightning.evaluation.video_sets import VideoSets, find_video_sets
from luve_lightning.reporting.study import AXES, FORMAT, StudyKey, plan_rater

METHODS = ("ourmethod", "interpolated", "plainlora", "withoutlfe")

Taste = Callable[[int, str, np.random.Generator], int]
"""The method chosen at an item and an axis."""


def write_method_videos(folder: Path, items: int, methods: tuple[str, ...] = METHODS) -> VideoSets:
    """One short video of a plain colour for each item and method, with its prompt beside it."""
    for method_number, method in enumerate(methods):
        for item in range(items):
            colour = (40 + 50 * method_number, 30 * item, 128)
            frames = np.broadcast_to(np.array(colour, np.uint8), (6, 16, 16, 3))
            path = folder / method / f"item-{item}.mp4"
            write_video(path, np.ascontiguousarray(frames), 8, lossless=item == 0)
            path.with_suffix(".json").write_text(json.dumps({"prompt": f"number {item} </script> & more"}))
    return find_video_sets({method: folder / method for method in methods})


def make_key(items: int, raters: int, repeats: int, seed: int = 0, methods: tuple[str, ...] = METHODS) -> StudyKey:
    """A key without videos."""
    rng = np.random.default_rng(seed)
    files = tuple(tuple(f"{rng.bytes(8).hex()}.mp4" for _ in methods) for _ in range(items))
    plans = tuple(tuple(plan_rater(items, len(methods), repeats, rng)) for _ in range(raters))
    names = tuple(f"item-{number}" for number in range(items))
    return StudyKey(f"study{seed}", methods, tuple(AXES), names, files, plans, seed)


def rater_file(key: StudyKey, rater: int, taste: Taste, seed: int = 0, until: int | None = None) -> dict[str, Any]:
    """What a rater's browser saves."""
    rng = np.random.default_rng([seed, rater])
    answers = [
        {
            "trial": number + 1,
            "choices": {axis: key.files[trial.item][taste(trial.item, axis, rng)] for axis in key.axes},
            "seconds": 3.5,
        }
        for number, trial in enumerate(key.plans[rater - 1][:until])
    ]
    return {"format": FORMAT, "study": key.study, "rater": rater, "trials": len(key.plans[rater - 1]),
            "started": "2026-11-22T10:00:00Z", "saved": "2026-11-22T10:30:00Z", "answers": answers}  # fmt: skip


def write_answers(folder: Path, contents: dict[str, dict[str, Any]]) -> Path:
    """A folder of answer files, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def prefers(method: int, strength: float, methods: int = 4) -> Taste:
    """Chooses one method with a probability, any of the others otherwise; new at every question."""

    def taste(item: int, axis: str, rng: np.random.Generator) -> int:
        del item, axis
        if rng.random() < strength:
            return method
        return int((method + 1 + rng.integers(methods - 1)) % methods)

    return taste


def steady(method: int, strength: float, methods: int = 4) -> Taste:
    """Like `prefers`, but says the same when asked the same again."""

    def taste(item: int, axis: str, rng: np.random.Generator) -> int:
        del rng
        own = np.random.default_rng([item, *axis.encode()])
        return prefers(method, strength, methods)(item, axis, own)

    return taste
