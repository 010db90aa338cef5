"""Dashboards, defined once: as Weights & Biases workspaces, and as panels of a report on local runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from luve_lightning.reporting.page import COLOURS, Chart, Series, Unreadable
from luve_lightning.reporting.plots import Curve, log_files, read_log

PREFIX_OF_RESULTS = "result/"

PanelKind = Literal["lines", "last", "results"]


@dataclass
class Panel:
    """One panel; its title is its key in the section.

    Args:
        metrics: names as logged, such as `val/psnr_rgb`.
        pattern: regular expression of further names; it must match a whole name.
        kind: `lines` over training steps; `last`, each run's last value; `results`, the result of an ablation's
            row (`result/<metric>`), for which a report has the tables of `luve ablate` instead.
    """

    metrics: list[str] = field(default_factory=list)
    pattern: str | None = None
    kind: PanelKind = "lines"

    def __post_init__(self) -> None:
        if not self.metrics and self.pattern is None:
            raise ValueError("panel: expected metrics or a pattern, got neither")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"pattern: {self.pattern!r} is no regular expression: {error}") from error
        if self.kind != "lines" and self.pattern is not None:
            raise ValueError(f"pattern: a panel of kind {self.kind} takes metrics only")
        if self.kind == "results" and any(not name.startswith(PREFIX_OF_RESULTS) for name in self.metrics):
            raise ValueError(f"metrics: those of kind results start with {PREFIX_OF_RESULTS}, got {self.metrics}")

    def chosen(self, names: Iterable[str]) -> list[str]:
        """The names among these that the panel shows: its metrics in order, then the pattern's matches, sorted."""
        known = set(names)
        matched = {name for name in known if self.pattern is not None and re.fullmatch(self.pattern, name)}
        return [*(name for name in self.metrics if name in known), *sorted(matched - set(self.metrics))]


@dataclass
class Section:
    """Panels by title.

    Args:
        panels: in order.
        local_only: whether the section is only in reports, not in the workspace.
    """

    panels: dict[str, Panel]
    local_only: bool = False


@dataclass
class Dashboard:
    """One workspace, and one part of a report.

    Args:
        title: heading.
        filter: selects runs, in wandb-workspaces' syntax: `Metric('Group') == 'vluer'`.
        folders: folders of local runs, as patterns below the working directory; runs are found below them.
        sections: sections by heading.
        group_by: configuration key by which wandb draws one line per group, with its spread.
        max_runs: most runs in a panel, the newest first.
    """

    title: str
    filter: str
    folders: list[str]
    sections: dict[str, Section]
    group_by: str | None = None
    max_runs: int = 24

    def __post_init__(self) -> None:
        if self.max_runs < 1:
            raise ValueError(f"max_runs: expected at least 1, got {self.max_runs}")


STEP = "trainer/global_step"  # what Lightning's WandbLogger logs beside every metric


def build_workspace(dashboard: Dashboard, project: str, entity: str) -> Any:
    """The workspace of a dashboard, a `wandb_workspaces.workspaces.Workspace`; nothing is sent.

    Args:
        dashboard: what to build.
        project: where the runs are.
        entity: account or team.

    Raises:
        ValueError: when the package does not understand `filter`.
    """
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    groups = [expr.Config(dashboard.group_by)] if dashboard.group_by else []
    try:
        runs = ws.RunsetSettings(filters=dashboard.filter, groupby=groups)
        workspace = ws.Workspace(
            entity=entity,
            project=project,
            name=dashboard.title,
            sections=[
                ws.Section(
                    name=name,
                    panels=[_panel(title, panel, dashboard) for title, panel in section.panels.items()],
                    is_open=True,
                )
                for name, section in dashboard.sections.items()
                if not section.local_only
            ],
            settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=dashboard.max_runs),
            runset_settings=runs,
        )
        workspace._to_model()  # the filter is parsed here
    except (SyntaxError, KeyError, ValueError) as error:
        raise ValueError(f"{dashboard.title}: wandb-workspaces refuses it: {error}") from error
    return workspace


def serialised(workspace: Any) -> dict[str, Any]:
    """The view as sent to the server, plain values only."""
    model = workspace._to_model()
    return dict(model.model_dump(mode="json", by_alias=True, exclude_none=True))


def _panel(title: str, panel: Panel, dashboard: Dashboard) -> Any:
    import wandb_workspaces.reports.v2 as wr

    given: dict[str, Any] = {"max_runs_to_show": dashboard.max_runs}
    if dashboard.group_by:
        given["groupby"] = wr.Config(dashboard.group_by)
        given |= {"groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
    if panel.kind == "lines":
        return wr.LinePlot(
            title=title,
            x=STEP,
            y=list(panel.metrics),
            metric_regex=None if panel.pattern is None else f"^(?:{panel.pattern})$",
            **given,
        )
    return wr.BarPlot(title=title, metrics=list(panel.metrics), **given)


@dataclass(frozen=True)
class LoggedRun:
    """A run folder, with its curves by metric."""

    name: str
    curves: dict[str, Curve]


@dataclass(frozen=True)
class DrawnPanel:
    """A panel with its content.

    Attributes:
        title: heading.
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
    """Draw every panel from the runs below the dashboard's folders, patterns that begin at `root`.

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
        for run in shown:
            last = (float(run.curves[metric][1][-1]) if metric in run.curves else None for metric in metrics)
            drawn.rows.append([run.name, *last])
    elif shown:
        for metric in metrics:
            drawn.charts.extend(_charts(title if metrics == [metric] else f"{title}: {metric}", metric, shown))
    return drawn


def _charts(title: str, metric: str, runs: Sequence[LoggedRun]) -> Iterator[Chart]:
    """One chart per few runs, as many as there are line styles, all with the same axis."""
    lines = [Series(run.name, *run.curves[metric]) for run in runs if metric in run.curves]
    low, high = min(line.y.min() for line in lines), max(line.y.max() for line in lines)
    groups = [lines[start : start + COLOURS] for start in range(0, len(lines), COLOURS)]
    for number, group in enumerate(groups, 1):
        name = title if len(groups) == 1 else f"{title} ({number} of {len(groups)})"
        same = None if len(groups) == 1 or low == high else (float(low), float(high))
        yield Chart(name, "optimiser step", metric, group, y_range=same)
