"""Curves of local runs, from the `metrics.csv` of Lightning's CSVLogger; results from the tables of ablations."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
_COLUMNS = ("row", "metric", "seeds", "mean", "low", "high", "paper")
_VERSION = re.compile(r"version_(\d+)")


@dataclass(frozen=True)
class LocalRun:
    """One run folder.

    Attributes:
        name: the folder, as found.
        curves: steps, rising, and finite values by metric.
    """

    name: str
    curves: dict[str, Curve]


@dataclass(frozen=True)
class Result:
    """One line of an ablation's table; numbers as text, as the file has them."""

    file: str
    row: str
    metric: str
    seeds: str
    mean: str
    low: str
    high: str
    paper: str


def find_runs(patterns: Iterable[str], root: Path) -> list[LocalRun]:
    """Every run below the folders that the patterns match under `root`, the last changed first.

    A run is a folder with `<logger>/version_<n>/metrics.csv` in it. Of its versions a later one (a resume, or a new
    run in the folder) replaces what was logged before from the step at which it begins.
    """
    folders = {folder for pattern in patterns for folder in root.glob(pattern) if folder.is_dir()}
    versions: dict[Path, dict[int, Path]] = {}
    for file in {file for folder in folders for file in folder.rglob("version_*/metrics.csv")}:
        number = _VERSION.fullmatch(file.parent.name)
        if number:
            versions.setdefault(file.parents[2], {})[int(number[1])] = file
    runs = []
    for folder, files in versions.items():
        changed = max(file.stat().st_mtime for file in files.values())
        curves = _together([_read(files[number]) for number in sorted(files)])
        name = str(folder.relative_to(root)) if folder.is_relative_to(root) else str(folder)
        runs.append((-changed, LocalRun(name, {metric: _curve(values) for metric, values in curves.items()})))
    return [run for _, run in sorted(runs, key=lambda item: (item[0], item[1].name))]


def read_results(patterns: Sequence[str], root: Path) -> list[Result]:
    """Lines of the tables of ablations that the patterns match under `root`.

    Raises:
        ValueError: for a CSV file without their columns.
    """
    found = []
    for path in _files(patterns, root):
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = set(_COLUMNS) - set(reader.fieldnames or ())
            if missing:
                raise ValueError(
                    f"results: {path} is no table of `luve ablate`: no column {sorted(missing)[0]}"
                )
            name = str(path.relative_to(root))
            found += [Result(name, *(line[column] for column in _COLUMNS)) for line in reader]
    return found


def read_worlds(patterns: Sequence[str], root: Path) -> dict[str, str]:
    """What each of these tables says of whose numbers they are, by file; from the JSON beside it."""
    worlds = {}
    for path in _files(patterns, root):
        about = path.with_suffix(".json")
        known = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
        worlds[str(path.relative_to(root))] = str(known.get("world", "not recorded"))
    return worlds


def _files(patterns: Sequence[str], root: Path) -> list[Path]:
    return sorted({path for pattern in patterns for path in root.glob(pattern)})


def _read(file: Path) -> dict[str, dict[int, float]]:
    """Finite values by metric and step; a line cut short by a kill is left out."""
    found: dict[str, dict[int, float]] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for line in csv.DictReader(lines):
            step = _number(line.get("step"))
            if step is None:
                continue
            for metric, text in line.items():
                value = None if metric in (None, "step") else _number(text)
                if value is not None:
                    found.setdefault(metric, {})[int(step)] = value
    return found


def _number(text: object) -> float | None:
    try:
        value = float(text) if isinstance(text, str) else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _together(versions: Sequence[dict[str, dict[int, float]]]) -> dict[str, dict[int, float]]:
    """One run's values: what was trained, then what tests logged beside it, at steps of their own."""
    curves: dict[str, dict[int, float]] = {}
    for values in filter(_is_training, versions):
        begin = min(step for column in values.values() for step in column)
        kept = {metric: {s: v for s, v in column.items() if s < begin} for metric, column in curves.items()}
        curves = {metric: kept.get(metric, {}) | values.get(metric, {}) for metric in {**kept, **values}}
    for values in versions:
        if not _is_training(values):  # `luve validate` logs the names of training, at step 0
            curves |= {metric: column for metric, column in values.items() if metric.startswith("test/")}
    return {metric: column for metric, column in curves.items() if column}


def _is_training(values: dict[str, dict[int, float]]) -> bool:
    return any(metric.startswith("train/") for metric in values)


def _curve(values: dict[int, float]) -> Curve:
    steps = sorted(values)
    return np.array(steps, dtype=np.float64), np.array([values[step] for step in steps], dtype=np.float64)
