"""Curves of local runs, from the `metrics.csv` of Lightning's CSVLogger; results from the tables of ablations."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
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
    """One line of an ablation's table; numbers as text, as the table has them."""

    table: str
    row: str
    metric: str
    seeds: str
    mean: str
    low: str
    high: str
    paper: str


def find_runs(patterns: Iterable[str], root: Path) -> list[LocalRun]:
    """Every run below the folders that the patterns match under `root`, the last changed first.

    A run is a folder with `<logger>/version_<n>/metrics.csv` in it. Of its versions (the first start, resumes,
    tests) a later one's values of a metric replace an earlier one's from the step at which they begin.
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
        curves: dict[str, dict[int, float]] = {}
        for number in sorted(files):
            _lay_over(curves, _read(files[number]))
        name = str(folder.relative_to(root)) if folder.is_relative_to(root) else str(folder)
        runs.append((-changed, LocalRun(name, {metric: _curve(found) for metric, found in curves.items()})))
    return [run for _, run in sorted(runs, key=lambda item: (item[0], item[1].name))]


def read_results(patterns: Sequence[str], root: Path) -> list[Result]:
    """Lines of the tables of ablations that the patterns match under `root`.

    Raises:
        ValueError: for a CSV file without their columns.
    """
    names = tuple(Result.__dataclass_fields__)
    found = []
    for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = set(names) - set(reader.fieldnames or ())
            if missing:
                raise ValueError(f"results: {path} is no table of `luve ablate`: no column {sorted(missing)[0]}")
            found += [Result(*(line[name] for name in names)) for line in reader]
    return found


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


def _lay_over(curves: dict[str, dict[int, float]], later: dict[str, dict[int, float]]) -> None:
    for metric, values in later.items():
        begin = min(values)
        kept = {step: value for step, value in curves.get(metric, {}).items() if step < begin}
        curves[metric] = kept | values


def _curve(values: dict[int, float]) -> Curve:
    steps = sorted(values)
    return np.array(steps, dtype=np.float64), np.array([values[step] for step in steps], dtype=np.float64)
