"""The local page of a dashboard: the same panels as its workspace, drawn from local runs, in one HTML file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from luve_lightning.dashboards.definition import PREFIX_OF_RESULTS, Dashboard, Panel
from luve_lightning.dashboards.local_runs import LocalRun, Result
from luve_lightning.pages import Chart, Series, draw_chart, render_document
from luve_lightning.pages.chart import COLOURS, Drawing

_RESULT_COLUMNS = (
    "table", "row", "metric", "seeds", "mean", "95 % interval", "difference", "its interval", "direction", "paper",
)  # fmt: skip
_ARROWS = {"higher": "↑", "lower": "↓"}


@dataclass
class DrawnPanel:
    """A panel with what there is to show.

    Attributes:
        title: of the panel.
        names: of its metrics and its pattern, as defined.
        kind: of the panel.
        charts: one a metric, or more where there are more runs than a chart has line styles.
        columns: of the table, for panels of other kinds than lines.
        rows: of the table; cells are numbers, text or None.
        left_out: older runs that are not shown.
    """

    title: str
    names: list[str]
    kind: str
    charts: list[Drawing] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    rows: list[list[float | str | None]] = field(default_factory=list)
    left_out: int = 0

    @property
    def empty(self) -> bool:
        """Whether there is no data for it."""
        return not self.charts and not self.rows


def draw_panels(
    dashboard: Dashboard, runs: Sequence[LocalRun], results: Sequence[Result]
) -> dict[str, list[DrawnPanel]]:
    """Every panel of the dashboard by its section.

    Args:
        dashboard: what to show.
        runs: the newest first.
        results: lines of the tables of ablations.
    """
    return {
        name: [_drawn(title, panel, dashboard, runs, results) for title, panel in section.panels.items()]
        for name, section in dashboard.sections.items()
    }


def dashboard_html(
    dashboard: Dashboard,
    runs: Sequence[LocalRun],
    panels: dict[str, list[DrawnPanel]],
    worlds: Mapping[str, Sequence[str]],
    made: str,
) -> str:
    """The page; it needs no network and no other file.

    Args:
        dashboard: what is shown.
        runs: whose curves it has.
        panels: from `draw_panels`.
        worlds: whose numbers the tables of results have, and the files of each.
        made: when and from what, for the page's foot.
    """
    context = {
        "dashboard": dashboard,
        "runs": [run.name for run in runs],
        "sections": panels,
        "worlds": worlds,
        "without_data": [panel.title for drawn in panels.values() for panel in drawn if panel.empty],
        "number": _number,
        "made": made,
    }
    return render_document(
        "luve_lightning.dashboards", "dashboard.html", ["base.css", "dashboard.css"], [], context
    )


def _drawn(
    title: str, panel: Panel, dashboard: Dashboard, runs: Sequence[LocalRun], results: Sequence[Result]
) -> DrawnPanel:
    names = [*panel.metrics, *([panel.pattern] if panel.pattern is not None else [])]
    drawn = DrawnPanel(title, names, panel.kind)
    if panel.kind == "results":
        drawn.columns = list(_RESULT_COLUMNS)
        wanted = {name.removeprefix(PREFIX_OF_RESULTS) for name in panel.metrics}
        drawn.rows = [_result_row(result) for result in results if result.metric in wanted]
        return drawn
    metrics = panel.chosen(name for run in runs for name in run.curves)
    having = [run for run in runs if any(metric in run.curves for metric in metrics)]
    shown, drawn.left_out = having[: dashboard.max_runs], max(0, len(having) - dashboard.max_runs)
    if panel.kind == "last":
        drawn.columns = ["run", *metrics]
        drawn.rows = [[run.name, *(_last(run, metric) for metric in metrics)] for run in shown]
    else:
        for metric in metrics:
            name = title if metrics == [metric] else f"{title}: {metric}"
            drawn.charts += _charts(name, metric, shown)
    return drawn


def _charts(title: str, metric: str, runs: Sequence[LocalRun]) -> Iterator[Drawing]:
    """One chart for each few runs, as many as there are line styles, all with the same axis."""
    lines = [Series(run.name, *run.curves[metric]) for run in runs if metric in run.curves]
    low, high = min(line.y.min() for line in lines), max(line.y.max() for line in lines)
    parts = [lines[start : start + COLOURS] for start in range(0, len(lines), COLOURS)]
    for number, part in enumerate(parts, 1):
        name = title if len(parts) == 1 else f"{title} ({number} of {len(parts)})"
        same = None if len(parts) == 1 or low == high else (float(low), float(high))
        yield draw_chart(Chart(name, "optimiser step", metric, part, y_range=same))


def _last(run: LocalRun, metric: str) -> float | None:
    return float(run.curves[metric][1][-1]) if metric in run.curves else None


def _result_row(result: Result) -> list[float | str | None]:
    file = PurePath(result.file)
    table, metric = (
        f"{file.parent.name}/{file.stem}",
        f"{result.metric} {_ARROWS.get(result.better, '')}".strip(),
    )
    interval = _interval(result.low, result.high)
    change = _interval(result.difference_low, result.difference_high)
    return [
        *(table, result.row, metric, result.seeds, result.mean, interval),
        *(result.difference or None, change, result.direction or None, result.paper or None),
    ]


def _interval(low: str, high: str) -> str | None:
    return f"{_number(low)} to {_number(high)}" if low and high else None


def _number(value: Any) -> str:
    """Of a table's cell: four significant digits are more than runs of one seed agree in."""
    if value is None:
        return ""
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return str(value)
