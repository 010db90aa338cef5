"""`luve sweep`: the rows and seeds of an ablation table as a Weights & Biases sweep, or as the same grid here."""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from luve_lightning.ablations.table import Table
from luve_lightning.ablations.table_files import read_table
from luve_lightning.cli import Verb
from luve_lightning.cli.ablate import TABLES, ablate, find_table
from luve_lightning.cli.environment import why_no_account
from luve_lightning.cli.errors import UsageError
from luve_lightning.reporting.dashboard import PREFIX_OF_RESULTS

VERBS = {
    "sweep": Verb(
        "Tables",
        "run an ablation table's rows and seeds as a wandb sweep, or here",
        positional="table",
    ),
}


_PROJECT = "luve-lightning"


def sweep(
    table: str,
    entity: str | None = None,
    project: str = _PROJECT,
    count: int | None = None,
    dry_run: bool = False,
) -> None:
    """Runs a table of ablations as a Weights & Biases sweep, one run for each row and seed.

    With an account (WANDB_API_KEY or a netrc entry) creates the sweep, starts one agent for it here, and at the end
    puts the table together from all that is finished. Without one runs the same rows and seeds here with
    `luve ablate`. The table may stand as a word of its own: luve sweep experts.

    Args:
        table: Folder under experiments/ablations, or the path of one, or of its table.yaml.
        entity: Account or team of the sweep; default the account's own.
        project: Of the sweep.
        count: Runs that this machine's agent takes; default until none is left. Without an account all are run.
        dry_run: Only print what would be run.
    """
    if count is not None and count < 1:
        raise ValueError(f"count: expected at least 1, or null for all, got {count}")
    folder = find_table(table)
    found = read_table(folder)
    # A table outside experiments/ablations is known by its path alone.
    name = found.name if folder == TABLES / found.name else str(folder)
    rows, seeds = list(found.rows), list(found.seeds)
    joined = [f"--{key}={','.join(map(str, values))}" for key, values in (("rows", rows), ("seeds", seeds))]
    together = shlex.join(["luve", "ablate", name, *joined])
    console, refused, calls = Console(emoji=False), why_no_account(), grid_words(found, name)
    if refused:
        _say(console, f"no sweep, {refused}: the same {len(calls)} rows and seeds run here")
        if dry_run:
            print(together)
        else:
            ablate(name, rows=rows, seeds=seeds)
        return
    if dry_run:
        _say(console, f"a sweep of {len(calls)} runs in project {project}:")
        print("\n".join([*map(shlex.join, calls), together]))
        return
    _run_agent(_create(sweep_configuration(found, name), entity, project), count)
    ablate(name, rows=rows, seeds=seeds)


def sweep_configuration(table: Table, name: str) -> dict[str, Any]:
    """The sweep of a table, as wandb takes it: a grid over its rows and seeds, one `luve ablate` a run.

    Args:
        table: of ablations.
        name: by which `luve ablate` finds it.
    """
    metric = next(iter(table.metrics.values()))
    return {
        "name": table.name,
        "description": f"{table.title}. {table.world}",
        "program": "luve",
        "command": ["${env}", "luve", "ablate", name, "${args}"],
        "method": "grid",
        # What each run logs of its row; shown, not searched for.
        "metric": {
            "name": f"{PREFIX_OF_RESULTS}{metric.name}",
            "goal": "minimize" if metric.better == "lower" else "maximize",
        },
        "parameters": {"rows": {"values": list(table.rows)}, "seeds": {"values": list(table.seeds)}},
    }


def grid_words(table: Table, name: str) -> list[list[str]]:
    """The command of each run of a sweep, as an agent puts it together."""
    grid = itertools.product(table.rows, table.seeds)
    return [["luve", "ablate", name, f"--rows={row}", f"--seeds={seed}"] for row, seed in grid]


def _create(config: dict[str, Any], entity: str | None, project: str) -> str:
    """The new sweep's path, entity/project/id."""
    import wandb

    entity = entity or wandb.Api().default_entity
    number = wandb.sweep(config, entity=entity, project=project)
    return f"{entity}/{project}/{number}"


def _run_agent(path: str, count: int | None) -> None:
    """Takes runs of the sweep until there are none; a failed run stops no other."""
    limit = [] if count is None else ["--count", str(count)]
    # `luve` is called by its name, also where its environment is not activated.
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    agent = [sys.executable, "-m", "wandb", "agent", *limit, path]
    done = subprocess.run(agent, env={**os.environ, "PATH": search}, check=False)
    if done.returncode:
        raise UsageError(f"the agent of {path} ended with exit status {done.returncode}; see above")


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
