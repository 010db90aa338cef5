"""Weights & Biases workspaces from definitions, by the wandb-workspaces package."""

from __future__ import annotations

from typing import Any

from luve_lightning.dashboards.definition import Dashboard, Panel

STEP = "trainer/global_step"  # what Lightning's WandbLogger logs beside every metric


def build_workspace(dashboard: Dashboard, project: str, entity: str) -> Any:
    """The workspace of a dashboard, a `wandb_workspaces.workspaces.Workspace`; nothing is sent.

    Args:
        dashboard: what it shows.
        project: of the runs.
        entity: the account or team.

    Raises:
        ValueError: when `filter` is none that the package understands.
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
        workspace._to_model()  # the filter is read here
    except (SyntaxError, KeyError, ValueError) as error:
        raise ValueError(f"{dashboard.title}: wandb-workspaces refuses it: {error}") from error
    return workspace


def serialised(workspace: Any) -> dict[str, Any]:
    """The view as it is sent to the server, plain values only."""
    model = workspace._to_model()
    return dict(model.model_dump(mode="json", by_alias=True, exclude_none=True))


def _panel(title: str, panel: Panel, dashboard: Dashboard) -> Any:
    import wandb_workspaces.reports.v2 as wr

    group = wr.Config(dashboard.group_by) if dashboard.group_by else None
    spread: dict[str, Any] = {"groupby": group, "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
    given = spread if group is not None else {}
    if panel.kind == "lines":
        return wr.LinePlot(
            title=title,
            x=STEP,
            y=list(panel.metrics),
            metric_regex=None if panel.pattern is None else f"^(?:{panel.pattern})$",
            max_runs_to_show=dashboard.max_runs,
            **given,
        )
    return wr.BarPlot(title=title, metrics=list(panel.metrics), max_runs_to_show=dashboard.max_runs, **given)
