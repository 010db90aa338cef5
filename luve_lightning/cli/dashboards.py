"""`luve dashboards`: Weights & Biases workspaces from YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from luve_lightning.cli import Verb
from luve_lightning.cli.environment import why_no_account
from luve_lightning.data.file_names import check_name
from luve_lightning.files import write_text
from luve_lightning.reporting.dashboard import Dashboard, build_workspace, serialised

VERBS = {
    "dashboards": Verb(
        "Tables",
        "build wandb workspaces from definitions",
    ),
}


def dashboards(
    dashboards: dict[str, Dashboard],
    output: Path = Path("runs/dashboards"),
    project: str = "luve-lightning",
    entity: str | None = None,
) -> None:
    """Builds each dashboard as a Weights & Biases workspace.

    With an account (WANDB_API_KEY or a netrc entry) the workspaces are saved in the project; without one they are
    written as JSON only. `luve report` shows the same panels, drawn from the CSV logs of local runs.

    Args:
        dashboards: What they show, by name; see experiments/dashboards.
        output: Folder of NAME.json.
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
    if refused:
        told = f"workspaces not saved, {refused}: written as JSON to {output}"
        console.print(told, soft_wrap=True, highlight=False, markup=False)


def _own_entity() -> Any:
    import wandb

    return wandb.Api().default_entity
