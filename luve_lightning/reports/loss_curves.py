"""Loss curves of a training run, from the `metrics.csv` files of Lightning's CSVLogger."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from luve_lightning.pages import Chart, Series, draw_chart
from luve_lightning.pages.chart import Drawing
from luve_lightning.reports.left_out import Unreadable
from luve_lightning.reports.provenance import Provenance, of_run


@dataclass(frozen=True)
class RunCurves:
    """A run's chart, and where it comes from."""

    drawing: Drawing
    provenance: Provenance | None


def read_curves(name: str, folder: Path, columns: Sequence[str]) -> RunCurves:
    """Draw the columns of a run that match a pattern.

    A run that was resumed has a file for each part: from the step at which a later part begins, it replaces what
    was logged before.

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
    files = sorted(folder.rglob("metrics.csv"), key=_version)
    if not files:
        raise FileNotFoundError("no metrics.csv there: missing, or the run logged elsewhere")
    logged: dict[str, dict[int, float]] = {}
    for file in files:
        part = _read(file)
        begin = min((step for values in part.values() for step in values), default=0)
        for column in logged:
            logged[column] = {step: value for step, value in logged[column].items() if step < begin}
        for column, values in part.items():
            logged.setdefault(column, {}).update(values)
    chosen = [
        column for column in sorted(logged) if logged[column] and any(fnmatch(column, p) for p in columns)
    ]
    if not chosen:
        raise Unreadable(f"no column like {' or '.join(columns)} in its metrics.csv")
    series = []
    for column in chosen:
        steps = sorted(logged[column])
        series.append(
            Series(
                column, np.array(steps, dtype=np.float64), np.array([logged[column][step] for step in steps])
            )
        )
    drawing = draw_chart(Chart(name, "optimiser step", "logged", series))
    return RunCurves(drawing, of_run(f"curves.{name}", folder))


def _version(file: Path) -> tuple[str, int, str]:
    """Sorts version_10 after version_9."""
    number = file.parent.name.rpartition("_")[2]
    return (str(file.parent.parent), int(number) if number.isdigit() else -1, file.parent.name)


def _read(file: Path) -> dict[str, dict[int, float]]:
    """Finite values by column and step."""
    columns: dict[str, dict[int, float]] = {}
    with file.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if "step" not in (reader.fieldnames or ()):
            raise Unreadable(f"{file.name} has no column step")
        for row in reader:
            try:
                step = int(float(row["step"]))
                values = {
                    key: float(text)
                    for key, text in row.items()
                    if key not in (None, "step", "epoch") and text
                }
            except (TypeError, ValueError):
                raise Unreadable(f"{file.name}: line {reader.line_num}: expected numbers") from None
            for column, value in values.items():
                if math.isfinite(value):
                    columns.setdefault(column, {})[step] = value
    return columns
