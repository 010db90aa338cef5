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

from luve_lightning.commands.ablate import ablate
from luve_lightning.commands.config_files import read_config
from luve_lightning.commands.errors import UsageError, did_you_mean
from luve_lightning.commands.wandb_account import why_no_account

SWEEPS = Path("experiments/sweeps")
_GRID = ("rows", "seeds")


def sweep(
    table: str,
    entity: str | None = None,
    project: str | None = None,
    count: int | None = None,
    dry_run: bool = False,
) -> None:
    """Runs a table of ablations as a Weights & Biases sweep, one run for each row and seed.

    With an account (WANDB_API_KEY or a netrc entry) creates the sweep of experiments/sweeps/TABLE.yaml, starts one
    agent for it here, and at the end puts the table together from all that is finished. Without one runs the same
    rows and seeds here with `luve ablate`. The table may stand as a word of its own: luve sweep experts.

    Args:
        table: Name of a file under experiments/sweeps, or a path of one.
        entity: Account or team of the sweep; default the account's own.
        project: Of the sweep; default the file's.
        count: Runs that this machine's agent takes; default until none is left. Without an account all are run.
        dry_run: Only print what would be run.
    """
    if count is not None and count < 1:
        raise ValueError(f"count: expected at least 1, or null for all, got {count}")
    config = read_sweep(find_sweep(table))
    values = {name: config["parameters"][name]["values"] for name in _GRID}
    console, refused = Console(emoji=False), why_no_account()
    calls = grid_words(config)
    joined = [f"--{name}={','.join(map(str, values[name]))}" for name in _GRID]
    together = shlex.join(["luve", "ablate", config["name"], *joined])
    if refused:
        _say(console, f"no sweep, {refused}: the same {len(calls)} rows and seeds run here")
        if dry_run:
            print(together)
        else:
            ablate(config["name"], rows=values["rows"], seeds=values["seeds"])
        return
    if dry_run:
        _say(console, f"a sweep of {len(calls)} runs in project {project or config['project']}:")
        print("\n".join([*map(shlex.join, calls), together]))
        return
    _run_agent(_create(config, entity, project), count)
    ablate(config["name"], rows=values["rows"], seeds=values["seeds"])


def find_sweep(table: str) -> Path:
    """The file of a sweep.

    Raises:
        FileNotFoundError: there is none.
    """
    for path in (SWEEPS / f"{table}.yaml", Path(table)):
        if path.is_file():
            return path
    known = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
    raise FileNotFoundError(f"table: no {SWEEPS / table}.yaml{did_you_mean(table, known)}")


def read_sweep(path: Path) -> dict[str, Any]:
    """A sweep's configuration, as wandb takes it.

    Raises:
        ValueError: it is no grid over rows and seeds.
    """
    config = read_config(path)
    for key in ("name", "project", "command", "parameters"):
        if not isinstance(config, dict) or not config.get(key):
            raise ValueError(f"{path}: {key}: required, but not given")
    if config.get("method") != "grid":
        raise ValueError(f"{path}: method: expected grid, got {config.get('method')!r}")
    if "${args}" not in config["command"]:
        raise ValueError(f"{path}: command: expected ${{args}} in it, got {config['command']!r}")
    given = config["parameters"]
    lists = {name: given.get(name, {}).get("values") for name in _GRID} if isinstance(given, dict) else {}
    if not all(isinstance(some, list) and some for some in lists.values()) or set(given) != set(_GRID):
        raise ValueError(f"{path}: parameters: expected lists of values for rows and seeds, got {given!r}")
    return config


def grid_words(config: dict[str, Any]) -> list[list[str]]:
    """The command of each run of a sweep, as an agent puts it together."""
    commands = []
    parameters = config["parameters"]
    for chosen in itertools.product(*(parameters[name]["values"] for name in _GRID)):
        arguments = [f"--{name}={value}" for name, value in zip(_GRID, chosen, strict=True)]
        words = [word for word in config["command"] if word != "${env}"]
        at = words.index("${args}")
        commands.append([*words[:at], *arguments, *words[at + 1 :]])
    return commands


def _create(config: dict[str, Any], entity: str | None, project: str | None) -> str:
    """The new sweep's path, entity/project/id."""
    import wandb

    project = project or config["project"]
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
