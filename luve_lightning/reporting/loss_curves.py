"""What a run logged over its steps, from the `metrics.csv` files of Lightning's CSVLogger."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from luve_lightning.reporting.chart import Chart, Series
from luve_lightning.reporting.provenance import Origin, Unreadable, of_run

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


@dataclass(frozen=True)
class RunCurves:
    """A run's chart, and where it comes from."""

    chart: Chart
    provenance: Origin | None


def read_curves(name: str, folder: Path, columns: Sequence[str]) -> RunCurves:
    """Draw the columns of a run that match a pattern.

    See `read_log` for a run that was resumed.

    Args:
        name: of the run, the chart's title.
        folder: of the run; its `metrics.csv` files may lie in folders inside it.
        columns: patterns such as `*loss*`.

    Raises:
        FileNotFoundError: no such folder, or no `metrics.csv` in it.
        Unreadable: no CSV of a CSVLogger, or no such column.
    """
    if not folder.is_dir():
        raise FileNotFoundError("missing")
    runs = log_files(folder)
    if not runs:
        raise FileNotFoundError("no metrics.csv there: missing, or the run logged elsewhere")
    logged: dict[str, Curve] = {}
    for run, files in runs.items():
        try:
            curves = read_log(files)
        except ValueError as error:
            raise Unreadable(str(error)) from None
        inside = "" if run == folder else f"{run.relative_to(folder)} "
        logged |= {f"{inside}{metric}": curve for metric, curve in curves.items()}
    chosen = [c for c in sorted(logged) if any(fnmatch(c.rpartition(" ")[2], p) for p in columns)]
    if not chosen:
        raise Unreadable(f"no column like {' or '.join(columns)} in its metrics.csv")
    series = [Series(column, *logged[column]) for column in chosen]
    return RunCurves(Chart(name, "optimiser step", "logged", series), of_run(f"curves.{name}", folder))
