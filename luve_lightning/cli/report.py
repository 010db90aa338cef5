"""`luve report`, `luve dashboards`, `luve sweep`: results on a page, in wandb's workspaces, and of its sweeps."""

from __future__ import annotations

import itertools
import json
import netrc
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from rich.console import Console

from luve_lightning.ablations.results import read_results
from luve_lightning.ablations.table import Table, read_table
from luve_lightning.cli import Verb
from luve_lightning.cli.ablate import TABLES, ablate, find_table
from luve_lightning.cli.errors import UsageError
from luve_lightning.data.video_files import check_name
from luve_lightning.files import write_text
from luve_lightning.reporting.dashboard import PREFIX_OF_RESULTS, Dashboard, build_workspace, serialised
from luve_lightning.reporting.report import PageText, ReportInputs, ResultTable, build_report, result_table
from luve_lightning.reporting.videos import Comparison
from luve_lightning.revision import package_version, revision_in_words
from luve_lightning.terminal import Steps, amount, say

VERBS = {
    "report": Verb(
        "Tables",
        "show tables, curves, dashboards, spectra and videos on one page",
        named=("results", "curves", "spectra", "videos"),
    ),
    "sweep": Verb("Tables", "run an ablation table's rows and seeds as a wandb sweep, or here", positional="table"),
    "dashboards": Verb("Tables", "build wandb workspaces from definitions"),
}

_PROJECT = "luve-lightning"
_HOST = "https://api.wandb.ai"
_COLUMNS = ["*loss*"]


def report(
    output: Path,
    results: dict[str, Path | None] | None = None,
    curves: dict[str, Path | None] | None = None,
    dashboards: dict[str, Dashboard | None] | None = None,
    spectra: dict[str, Path | None] | None = None,
    comparisons: dict[str, Comparison | None] | None = None,
    videos: dict[str, Path | None] | None = None,
    columns: list[str] = _COLUMNS,
    title: str = "LuVe Lightning: report",
    note: str = "",
    limit_mib: float = 20.0,
) -> None:
    """Builds one self-contained HTML page from results, curves, spectra, comparisons and videos.

    The page loads nothing over a network and opens from a file. The paper's numbers stand in columns of their own;
    each table says on what it was measured. Inputs that are missing, unreadable or too large for the page are
    listed on it and printed; the page is built all the same.

    Args:
        output: HTML file of the page.
        results: Tables of `luve ablate`, CSV files by name: --results NAME=FILE.csv, repeated.
        curves: Folders of training runs with Lightning's metrics.csv, by name: --curves NAME=DIR.
        dashboards: Panels of many runs: --config experiments/dashboards/vluer.yaml, repeated.
        spectra: Folders or CSV files written by `luve spectra`, by name: --spectra NAME=DIR.
        comparisons: Pairs of videos by name, each with a, b and optionally labels, frames (their numbers) and
            caption.
        videos: Video files, or folders of them, by name: --videos NAME=PATH.
        columns: Patterns of the columns of metrics.csv to draw.
        title: Title of the page.
        note: Shown at the top: what holds for everything on the page.
        limit_mib: Size limit of the page, in MiB. Comparisons, then videos that would exceed it are left out.
    """
    started, console = time.perf_counter(), Console(emoji=False)
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"output: expected a file that ends in .html, got {output}")
    inputs = ReportInputs(
        results or {}, curves or {}, spectra or {}, comparisons or {}, videos or {}, columns, dashboards or {}
    )
    if inputs.empty:
        raise ValueError(
            "nothing to show: give results, curves, dashboards, spectra, comparisons or videos, "
            "or --config experiments/report/mini.yaml"
        )
    chosen: list[Mapping[str, object]] = [inputs.comparisons, inputs.videos]
    with Steps(console) as steps:
        count = sum(value is not None for by_name in chosen for value in by_name.values())
        steps.begin("comparisons and videos", count)
        made = build_report(inputs, PageText(title, note, _facts()), read_result_table, limit_mib, steps.advance)
    write_text(output, made.html)
    shown = ", ".join(f"{kind} {count}" for kind, count in made.counts.items())
    lines = [f"{output}: {shown}; {len(made.html.encode()) / 2**20:.2f} of {limit_mib:g} MiB"]
    lines += [f"  left out: {line}" for line in made.left_out]
    lines.append(f"{time.perf_counter() - started:.0f} s")
    say(console, "\n".join(lines))


def read_result_table(name: str, path: Path) -> ResultTable:
    """An ablation table from its file, as the page shows it."""
    return result_table(name, path, *read_results(path))


def _facts() -> dict[str, str]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision_in_words(),
        "version": f"luve-lightning {package_version()}",
        "python": platform.python_version(),
        "command": shlex.join(["luve", *sys.argv[1:]]),
    }


def sweep(
    table: str, entity: str | None = None, project: str = _PROJECT, count: int | None = None, dry_run: bool = False
) -> None:
    """Runs a table of ablations as a Weights & Biases sweep, one run per row and seed.

    With an account (WANDB_API_KEY or a netrc entry), creates the sweep, starts one agent for it here, and finally
    puts the table together from everything finished. Without one, runs the same rows and seeds here with `luve
    ablate`. The table may be given without an option: luve sweep experts.

    Args:
        table: Folder under experiments/ablations, or the path of a folder or of its table.yaml.
        entity: Account or team of the sweep; default the account's own.
        project: Project of the sweep.
        count: Number of runs for this machine's agent; default until none is left. Without an account all are run.
        dry_run: Only print what would run.
    """
    if count is not None and count < 1:
        raise ValueError(f"count: expected at least 1, or null for all, got {count}")
    folder = find_table(table)
    found = read_table(folder)
    # A table outside experiments/ablations is known only by its path.
    name = found.name if folder == TABLES / found.name else str(folder)
    rows, seeds = list(found.rows), list(found.seeds)
    joined = [f"--{key}={','.join(map(str, values))}" for key, values in (("rows", rows), ("seeds", seeds))]
    together = shlex.join(["luve", "ablate", name, *joined])
    console, refused, calls = Console(emoji=False), why_no_account(), grid_words(found, name)
    if refused:
        say(console, f"no sweep, {refused}: the same {len(calls)} rows and seeds run here")
        if dry_run:
            print(together)
        else:
            ablate(name, rows=rows, seeds=seeds)
        return
    if dry_run:
        say(console, f"a sweep of {amount(len(calls), 'run')} in project {project}:")
        print("\n".join([*map(shlex.join, calls), together]))
        return
    _run_agent(_create(sweep_configuration(found, name), entity, project), count)
    ablate(name, rows=rows, seeds=seeds)


def sweep_configuration(table: Table, name: str) -> dict[str, Any]:
    """The sweep of a table, as wandb takes it: a grid over its rows and seeds, one `luve ablate name` per run."""
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

    entity = entity or _own_entity()
    number = wandb.sweep(config, entity=entity, project=project)
    return f"{entity}/{project}/{number}"


def _run_agent(path: str, count: int | None) -> None:
    """Takes runs of the sweep until there are none; a failed run stops no other."""
    limit = [] if count is None else ["--count", str(count)]
    # `luve` is called by name, even where its environment is not activated.
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    agent = [sys.executable, "-m", "wandb", "agent", *limit, path]
    done = subprocess.run(agent, env={**os.environ, "PATH": search}, check=False)
    if done.returncode:
        raise UsageError(f"the agent of {path} ended with exit status {done.returncode}; see above")


def dashboards(
    dashboards: dict[str, Dashboard],
    output: Path = Path("runs/dashboards"),
    project: str = "luve-lightning",
    entity: str | None = None,
) -> None:
    """Builds each dashboard as a Weights & Biases workspace.

    With an account (WANDB_API_KEY or a netrc entry), the workspaces are saved in the project; without one, they
    are written as JSON only. `luve report` shows the same panels, drawn from the CSV logs of local runs.

    Args:
        dashboards: Dashboards by name; see experiments/dashboards.
        output: Folder of NAME.json.
        project: Project of the workspaces.
        entity: Account or team of the workspaces; default the account's own.
    """
    if not dashboards:
        raise ValueError("dashboards: expected at least one, for example --config experiments/dashboards/vluer.yaml")
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
        say(console, f"workspaces not saved, {refused}: written as JSON to {output}")


def _own_entity() -> Any:
    import wandb

    return wandb.Api().default_entity


def why_no_account() -> str | None:
    """Why nothing can be sent to Weights & Biases, in a few words; None when there is an account.

    Looks at WANDB_MODE and where `wandb login` and its documentation put a key: WANDB_API_KEY, or the netrc file's
    entry for the host of WANDB_BASE_URL. No key is read, and nothing is sent.
    """
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        return f"WANDB_MODE is {mode}"
    host = urlparse(os.environ.get("WANDB_BASE_URL", _HOST)).hostname or ""
    if os.environ.get("WANDB_API_KEY") or _in_netrc(host):
        return None
    return f"no account: neither WANDB_API_KEY nor a netrc entry of {host}"


def _in_netrc(host: str) -> bool:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
