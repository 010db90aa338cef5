"""A dashboard's panels drawn from local runs: the same as in its workspace, but for results, which are tables here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from luve_lightning.reporting.chart import COLOURS, Chart, Series
from luve_lightning.reporting.dashboard import Dashboard, Panel
from luve_lightning.reporting.loss_curves import Curve, log_files, read_log
from luve_lightning.reporting.provenance import Unreadable


@dataclass(frozen=True)
class LoggedRun:
    """A run folder, and its curves by metric."""

    name: str
    curves: dict[str, Curve]


@dataclass(frozen=True)
class DrawnPanel:
    """A panel with what there is to show.

    Attributes:
        title: its heading.
        metrics: names and pattern as defined.
        charts: one per metric, or more where there are more runs than line styles.
        columns: headings of the table of last values.
        rows: the table's cells; None where a run has no value.
        left_out: number of older runs that are not shown.
    """

    title: str
    metrics: list[str]
    charts: list[Chart] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    rows: list[list[float | str | None]] = field(default_factory=list)
    left_out: int = 0


@dataclass(frozen=True)
class DrawnDashboard:
    """A dashboard's title, the names of its runs, newest first, and its panels by section."""

    title: str
    runs: list[str]
    sections: dict[str, list[DrawnPanel]]


def read_dashboard(dashboard: Dashboard, root: Path = Path()) -> DrawnDashboard:
    """Draw every panel from the runs below the dashboard's folders.

    Args:
        dashboard: what to show.
        root: where its folders' patterns begin.

    Raises:
        FileNotFoundError: no run there.
        Unreadable: a `metrics.csv` that no CSVLogger wrote.
    """
    runs = find_runs(dashboard.folders, root)
    if not runs:
        raise FileNotFoundError("no metrics.csv there: missing, or the runs logged elsewhere")
    sections = {
        name: [
            _drawn(title, panel, runs, dashboard.max_runs)
            for title, panel in section.panels.items()
            if panel.kind != "results"
        ]
        for name, section in dashboard.sections.items()
    }
    shown = {name: panels for name, panels in sections.items() if panels}
    return DrawnDashboard(dashboard.title, [run.name for run in runs], shown)


def find_runs(patterns: Sequence[str], root: Path) -> list[LoggedRun]:
    """Every run below the folders that the patterns match under `root`, the last changed first."""
    folders = {folder for pattern in patterns for folder in root.glob(pattern) if folder.is_dir()}
    found = {run: files for folder in sorted(folders) for run, files in log_files(folder).items()}
    runs = []
    for folder, files in found.items():
        try:
            curves = read_log(files)
        except ValueError as error:
            raise Unreadable(str(error)) from None
        newest = max(file.stat().st_mtime for file in files)
        runs.append((-newest, LoggedRun(str(folder.relative_to(root)), curves)))
    return [run for _, run in sorted(runs, key=lambda item: (item[0], item[1].name))]


def _drawn(title: str, panel: Panel, runs: Sequence[LoggedRun], max_runs: int) -> DrawnPanel:
    metrics = panel.chosen(name for run in runs for name in run.curves)
    having = [run for run in runs if any(metric in run.curves for metric in metrics)]
    shown = having[:max_runs]
    named = [*panel.metrics, *([panel.pattern] if panel.pattern is not None else [])]
    drawn = DrawnPanel(title, named, left_out=len(having) - len(shown))
    if panel.kind == "last" and shown:
        drawn.columns.extend(["run", *metrics])
        drawn.rows.extend([run.name, *(_last(run, metric) for metric in metrics)] for run in shown)
    elif shown:
        for metric in metrics:
            drawn.charts.extend(
                _charts(title if metrics == [metric] else f"{title}: {metric}", metric, shown)
            )
    return drawn


def _charts(title: str, metric: str, runs: Sequence[LoggedRun]) -> Iterator[Chart]:
    """One chart for every few runs, as many as there are line styles, all with the same axis."""
    lines = [Series(run.name, *run.curves[metric]) for run in runs if metric in run.curves]
    low, high = min(line.y.min() for line in lines), max(line.y.max() for line in lines)
    groups = [lines[start : start + COLOURS] for start in range(0, len(lines), COLOURS)]
    for number, group in enumerate(groups, 1):
        name = title if len(groups) == 1 else f"{title} ({number} of {len(groups)})"
        same = None if len(groups) == 1 or low == high else (float(low), float(high))
        yield Chart(name, "optimiser step", metric, group, y_range=same)


def _last(run: LoggedRun, metric: str) -> float | None:
    return float(run.curves[metric][1][-1]) if metric in run.curves else None
