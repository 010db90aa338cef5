"""`luve sweep`, `luve dashboards`, `luve rehearse`: tables as wandb sweeps, its workspaces; the recipe in small."""

from __future__ import annotations

import importlib.util
import itertools
import json
import netrc
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from rich.console import Console

from luve_lightning.ablations.rehearsal import EXPERIMENTS, RANDOM, Rehearsal, RehearsalSize
from luve_lightning.ablations.rehearsal_run import RehearsalRun, only_rehearsal
from luve_lightning.ablations.rehearsal_stage import StageResult
from luve_lightning.ablations.rehearsal_table import TABLE, rehearsal_rows, terminal_lines, write_table
from luve_lightning.ablations.table import Table, read_table
from luve_lightning.cli import Verb
from luve_lightning.cli.ablate import TABLES, ablate, find_table
from luve_lightning.cli.compose import compose
from luve_lightning.cli.errors import UsageError, did_you_mean
from luve_lightning.data.video_files import check_name
from luve_lightning.files import check_writable, write_text
from luve_lightning.machine import PACKAGE_ROOT, check_workers, cores, revision_in_words, visible_gpus
from luve_lightning.reporting.dashboard import PREFIX_OF_RESULTS, Dashboard, build_workspace, serialised
from luve_lightning.terminal import say

VERBS = {
    "sweep": Verb("Tables", "run an ablation table's rows and seeds as a wandb sweep, or here", positional="table"),
    "dashboards": Verb("Tables", "build wandb workspaces from definitions"),
    "rehearse": Verb(
        "Measurement", "run the whole recipe with a few clips and steps, beside its plan", slow=False, goes_on=True
    ),
}

_PACKAGES = ("torch", "lightning", "diffusers", "transformers", "peft", "triton", "numpy", "av", "luve-lightning")
_LOG_WIDTH = 200
_PROJECT = "luve-lightning"
_HOST = "https://api.wandb.ai"


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
        say(console, f"a sweep of {len(calls)} runs in project {project}:")
        print("\n".join([*map(shlex.join, calls), together]))
        return
    _run_agent(_create(sweep_configuration(found, name), entity, project), count)
    ablate(name, rows=rows, seeds=seeds)


def rehearse(
    backbone: str = "mini",
    size: RehearsalSize | None = None,
    attention: Literal["dense", "windows"] = "dense",
    data: Path | None = None,
    devices: int = 1,
    steps: int = 4,
    video_steps: int | None = None,
    clips: int | None = None,
    stages: str | list[str] | None = None,
    again: bool = False,
    stop: bool = True,
    validate: bool = True,
    limit: float = 1200.0,
    gpu: str | None = None,
    output: Path | None = None,
    changes: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Runs every stage of the recipe with a few clips and steps, and sets what each takes beside its plan.

    From clips to a generated video: precompute, embed, score, both phases of the VLUer, adaptation, LFE, HFE, generate,
    upsample, evaluate, report, each by its own configuration in a process of its own. Each is stopped once by SIGTERM,
    as SLURM does, and resumed, and must reach the same step. What fails is reported with the end of its log, and stops
    only what needs it; the exit code is 1 then. The table is written after each stage: rehearsal.md and .json in the
    output, beside each stage's log in stages/. The same command later goes on: what is done stays.

    Args:
        backbone: mini; wan2.1-1.3b, random weights of that size; a folder, or a hub id.
        size: Of the videos, which chooses the configurations: mini, 2k or 4k. Default mini with the mini backbone, else
            2k.
        attention: Dense, or in windows; the mini world's is dense.
        data: Folder of clips, or an index; default a few painted ones.
        devices: GPUs of trainings and precompute, or processes on a CPU.
        steps: Steps of each training; the VLUer's, which are short, take more.
        video_steps: Denoising steps of the video; default as configured.
        clips: Number of clips of the whole recipe, which GPU-hours and terabytes are for. Default 20,000, the paper's;
            the mini world's 248.
        stages: Run only these, separated by commas, and what is missing of what they need.
        again: Run them even if they are done.
        stop: Stop each stage once.
        validate: Let each training validate on one batch at its end.
        limit: Seconds for one stage.
        gpu: The GPU's speed for the plans, a file of luve bench --subject speed, or h200. Default it is measured first;
            without a GPU, nothing is planned.
        output: Folder for everything; with random weights of Wan2.1-1.3B's size some 60 GB. Default
            runs/rehearsal/<backbone>-<size>-<attention>-<devices>.
        changes: More values of a stage's configuration, by its name: --changes.lfe '{data: {init_args: {num_workers:
            0}}}'.
    """
    names = visible_gpus()
    size = size or ("mini" if backbone == "mini" else "2k")
    counts = {"devices": (devices, 1), "steps": (steps, 2), "video_steps": (video_steps, 1), "clips": (clips, 1)}
    _check_counts(counts, limit, names)
    _check_sources(backbone, size, attention, data, gpu)
    kind = f"{Path(backbone).name}-{size}-{attention}-{devices}"
    root = output or Path("runs/rehearsal") / kind
    check_writable(root / TABLE)
    scorer = PACKAGE_ROOT / ".venv-hpsv3/bin/luve"
    recipe = Rehearsal(
        root,
        compose,
        backbone,
        size,
        attention == "windows",
        data,
        devices,
        bool(names),
        steps,
        video_steps,
        clips,
        validate,
        scorer if scorer.is_file() else None,
        importlib.util.find_spec("wandb") is not None,
        bool(names) and gpu is None,
    )
    found, console = recipe.stages(), Console(emoji=False)
    chosen = _chosen(stages, [stage.name for stage in found], changes or {})
    facts = rehearsal_facts(f"Rehearsal: {backbone}, {size}, {attention}", names[:devices], devices)

    def updated(results: Mapping[str, StageResult]) -> None:
        write_table(root, rehearsal_rows(found, results, root), results, facts)

    def tell(text: str) -> None:
        say(console, f"[{datetime.now():%H:%M:%S}] {text}")

    run = RehearsalRun(found, recipe.given(), root, changes or {}, stop, limit, gpu, updated, tell)
    with only_rehearsal(root):
        try:
            run.run(chosen, again)
        finally:
            wide = console if console.is_terminal else Console(emoji=False, width=_LOG_WIDTH)
            for line in terminal_lines(rehearsal_rows(found, run.results, root), run.results, facts):
                wide.print(line, soft_wrap=isinstance(line, str), highlight=False, markup=False)
            say(console, f"{root / TABLE}.md and .json; logs in {root / 'stages'}")
    if any(result.status != "done" for name, result in run.results.items() if name in run.wanted(chosen)):
        raise SystemExit(1)


def _check_counts(counts: Mapping[str, tuple[int | None, int]], limit: float, gpus: Sequence[str]) -> None:
    """Refuse a number below the least one that stands beside it, and more devices than are here."""
    for key, (count, least) in counts.items():
        if count is not None and count < least:
            raise ValueError(f"{key}: expected at least {least}, got {count}")
    if not limit > 0:
        raise ValueError(f"limit: expected seconds above 0, got {limit:g}")
    devices, _ = counts["devices"]
    assert devices is not None
    if gpus and devices > len(gpus):
        raise ValueError(f"devices: {len(gpus)} GPUs are here, got {devices}")
    if not gpus:
        check_workers("devices", devices, 1)


def _check_sources(backbone: str, size: str, attention: str, data: Path | None, gpu: str | None) -> None:
    """Refuse what would show only inside a stage: configurations and files that are not there."""
    if size == "mini" and attention == "windows":
        raise ValueError("attention: the mini world has no configurations with windows; expected dense, or --size 2k")
    if data is not None and not data.exists():
        raise FileNotFoundError(f"data: no such file or folder: {data}")
    if backbone not in ("mini", RANDOM):
        from luve_lightning.models.folders import is_local

        if is_local(backbone) and not (Path(backbone) / "model_index.json").is_file():
            raise FileNotFoundError(
                f"backbone {backbone}: no model_index.json in it; expected a diffusers pipeline folder"
            )
    if gpu is not None:
        from luve_lightning.analysis.cost import gpu_speed

        gpu_speed(gpu, None)
    if not EXPERIMENTS.is_dir():
        raise FileNotFoundError(f"the recipe's configurations are not here: expected {EXPERIMENTS}/ in {Path.cwd()}")


def _chosen(stages: str | list[str] | None, known: list[str], changes: Mapping[str, object]) -> list[str]:
    """Names of stages, as given or all."""
    words = stages.strip("[] ").split(",") if isinstance(stages, str) else stages
    names = known if words is None else [word.strip() for word in words if word.strip()]
    if not names:
        raise ValueError(f"stages: expected one or more of {', '.join(known)}")
    for key, some in (("stages", names), ("changes", list(changes))):
        for name in some:
            if name not in known:
                raise ValueError(f"{key}: no stage {name!r}{did_you_mean(name, known)}")
    return [name for name in known if name in names]


def rehearsal_facts(title: str, gpus: Sequence[str], devices: int) -> dict[str, str]:
    """What a table of measurements was made on."""
    versions = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    packages = [f"{name} {versions[name]}" for name in _PACKAGES if name in versions]
    device = f"{len(gpus)} x {gpus[0]}" if gpus else f"{platform.machine()} CPU, {cores()} cores, {devices} processes"
    return {
        "title": title,
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "device": device,
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": ", ".join(packages),
        "revision": revision_in_words(),
        "command": shlex.join(["luve", *sys.argv[1:]]),
    }


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
