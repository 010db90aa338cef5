"""`luve dashboards`: Weights & Biases workspaces from YAML, and the same panels as local pages."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from luve_lightning.commands.wandb_account import why_no_account
from luve_lightning.dashboards.definition import Dashboard
from luve_lightning.dashboards.local_runs import find_runs, read_results, read_worlds
from luve_lightning.dashboards.page import dashboard_html, draw_panels
from luve_lightning.dashboards.workspaces import build_workspace, serialised
from luve_lightning.datasets.file_names import check_name
from luve_lightning.files import write_text


def dashboards(
    dashboards: dict[str, Dashboard],
    output: Path = Path("runs/dashboards"),
    root: Path = Path(),
    project: str = "luve-lightning",
    entity: str | None = None,
) -> None:
    """Builds each dashboard as a Weights & Biases workspace and as a local page of the same panels.

    With an account (WANDB_API_KEY or a netrc entry) the workspaces are saved in the project; without one they are
    written as JSON only. The pages are drawn from the CSV logs of local runs either way, one HTML file each, which
    loads nothing over a network.

    Args:
        dashboards: What they show, by name; see experiments/dashboards.
        output: Folder of NAME.json and NAME.html.
        root: Folder below which the dashboards' `folders` and `results` are.
        project: Of the workspaces.
        entity: Account or team of the workspaces; default the account's own.
    """
    if not dashboards:
        raise ValueError(
            "dashboards: expected at least one, for example --config experiments/dashboards/vluer.yaml"
        )
    for name in dashboards:
        check_name(name, "dashboards:")
    console, refused = Console(emoji=False), why_no_account()
    owner = entity or ("nobody" if refused else _own_entity())
    for name, dashboard in dashboards.items():
        workspace = build_workspace(dashboard, project, owner)
        text = json.dumps(serialised(workspace), indent=2) + "\n"
        write_text(output / f"{name}.json", text)
        if not refused:
            workspace.save()  # prints the address
        console.print(
            _write_page(name, dashboard, output, root), soft_wrap=True, highlight=False, markup=False
        )
    if refused:
        told = f"workspaces not saved, {refused}: written as JSON to {output}"
        console.print(told, soft_wrap=True, highlight=False, markup=False)


def _write_page(name: str, dashboard: Dashboard, output: Path, root: Path) -> str:
    """Writes one page; returns what to say about it."""
    runs = find_runs(dashboard.folders, root)
    results = read_results(dashboard.results, root)
    panels = draw_panels(dashboard, runs, results)
    made = f"Made by `luve dashboards` on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
    page = output / f"{name}.html"
    worlds = read_worlds(dashboard.results, root)
    write_text(page, dashboard_html(dashboard, runs, panels, worlds, made))
    every = [panel for drawn in panels.values() for panel in drawn]
    without = [panel.title for panel in every if panel.empty]
    tables = len({result.file for result in results})
    said = f"{page}: {len(every) - len(without)} of {len(every)} panels from {_counted(len(runs), 'run')}"
    said += f" and {_counted(tables, 'table')}"
    return f"{said}; no data for {', '.join(without)}" if without else said


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _own_entity() -> Any:
    import wandb

    return wandb.Api().default_entity
