"""Loss curves of a training run, from the `metrics.csv` files of Lightning's CSVLogger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from luve_lightning.pages import Chart, Series, draw_chart
from luve_lightning.pages.chart import Drawing
from luve_lightning.pages.training_log import Curve, log_files, read_log
from luve_lightning.reports.left_out import Unreadable
from luve_lightning.reports.provenance import Provenance, of_run


@dataclass(frozen=True)
class RunCurves:
    """A run's chart, and where it comes from."""

    drawing: Drawing
    provenance: Provenance | None


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
    drawing = draw_chart(Chart(name, "optimiser step", "logged", series))
    return RunCurves(drawing, of_run(f"curves.{name}", folder))
