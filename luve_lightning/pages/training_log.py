"""What a run logged over its steps, from the `metrics.csv` files of Lightning's CSVLogger."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
Logged = dict[str, dict[int, float]]

_VERSION = re.compile(r"version_(\d+)")


def log_files(folder: Path) -> dict[Path, list[Path]]:
    """The files of every run below a folder, `<run>/<logger>/version_<n>/metrics.csv`, by run, in the order of n."""
    runs: dict[Path, dict[int, Path]] = {}
    for file in sorted(folder.rglob("version_*/metrics.csv")):
        number = _VERSION.fullmatch(file.parent.name)
        if number:
            runs.setdefault(file.parents[2], {})[int(number[1])] = file
    return {run: [files[number] for number in sorted(files)] for run, files in runs.items()}


def read_log(files: Sequence[Path]) -> dict[str, Curve]:
    """One run's curves: steps, rising, and finite values by metric.

    A later file of training (a resume, or a new run in the folder) replaces what was logged before from the step at
    which it begins. `luve test` logs into files of its own, at steps of its own: of these, what begins with `test/`
    is added.

    Args:
        files: of one run, in the order of writing.

    Raises:
        ValueError: for a file without a column `step`.
    """
    versions = [_read(file) for file in files]
    curves: Logged = {}
    for values in filter(_is_training, versions):
        begin = min(step for column in values.values() for step in column)
        kept = {metric: {s: v for s, v in column.items() if s < begin} for metric, column in curves.items()}
        curves = {metric: kept.get(metric, {}) | values.get(metric, {}) for metric in {**kept, **values}}
    for values in versions:
        if not _is_training(values):  # `luve validate` logs the names of training, at step 0
            curves |= {metric: column for metric, column in values.items() if metric.startswith("test/")}
    return {metric: _curve(column) for metric, column in curves.items() if column}


def _read(file: Path) -> Logged:
    """Finite values by metric and step; a line cut short by a kill is left out."""
    found: Logged = {}
    with file.open(newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        if "step" not in (reader.fieldnames or ()):
            raise ValueError(f"{file}: expected a CSVLogger's file, it has no column step")
        for line in reader:
            step = _number(line["step"])
            if step is None:
                continue
            for metric, text in line.items():
                value = None if metric in (None, "step", "epoch") else _number(text)
                if value is not None:
                    found.setdefault(metric, {})[int(step)] = value
    return found


def _number(text: object) -> float | None:
    try:
        value = float(text) if isinstance(text, str) else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _is_training(values: Logged) -> bool:
    return any(metric.startswith("train/") for metric in values)


def _curve(values: dict[int, float]) -> Curve:
    steps = sorted(values)
    return np.array(steps, dtype=np.float64), np.array([values[step] for step in steps], dtype=np.float64)
