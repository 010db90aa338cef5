"""`luve ablate`: runs the rows of the paper's tables, and writes the tables."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from luve_lightning.ablations.graph import AblationPlanner, Contents
from luve_lightning.ablations.job_array import JobOptions
from luve_lightning.ablations.output import sweep_run
from luve_lightning.ablations.runners import Slots
from luve_lightning.ablations.table import TABLE_FILE, Table, read_table
from luve_lightning.cli import Verb
from luve_lightning.cli.ablation_runs import TableRun, TableRuns, Targets
from luve_lightning.cli.compose import compose
from luve_lightning.cli.errors import did_you_mean
from luve_lightning.files import text_digest
from luve_lightning.machine import cores
from luve_lightning.reporting.dashboard import PREFIX_OF_RESULTS

VERBS = {
    "ablate": Verb("Tables", "repeat the paper's tables: every row, several seeds", positional="table...", goes_on=True)
}


TABLES = Path("experiments/ablations")
RESULTS = Path("experiments/results")
PROGRAM = (sys.executable, "-m", "luve_lightning")
_JOB = JobOptions()
_ALL = "all"


def ablate(
    table: str | list[str],
    rows: str | list[str] | None = None,
    seeds: str | int | list[int] | None = None,
    settings: dict[str, Any] | None = None,
    stages: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    world: str | None = None,
    results: str | None = None,
    output: Path | None = None,
    folder: Path = Path("runs/ablations"),
    slots: int = 0,
    executor: Literal["local", "slurm"] = "local",
    job: JobOptions = _JOB,
    dry_run: bool = False,
) -> None:
    """Runs the rows of a table, each for several seeds, and writes means with intervals beside the paper's values.

    The table may be given without an option: luve ablate experts --rows full,without_lfe. Each row is a graph of
    luve commands. What rows, seeds and tables share is run once and kept under a hash of everything it depends on,
    so an interrupted run continues and a second one runs only what is new. Every command's output is in its
    folder's log.txt. A row that fails is reported at the end, with exit code 1, and stops no other.

    Several tables, luve ablate experts upsampling, or all of them, luve ablate all, run together: their stages share
    the slots, those of a table named earlier first, and each table is written where it would be by itself. They are
    whole and unchanged: options that say which part of a table, or what replaces some of it, are for one table at a
    time.

    Args:
        table: Folders under experiments/ablations, or paths of folders or of their table.yaml; all for every one.
        rows: Names, separated by commas; default all.
        seeds: Whole numbers, separated by commas; default the table's.
        settings: Replaces some of the table's settings: --settings.train_steps 20, or a file with --config.
        stages: Replaces parts of the table's stages.
        metrics: Replaces parts of the table's metrics.
        world: Replaces the table's sentence on whose numbers these are.
        results: Replaces the table's folder of results.
        output: CSV file of the table; .json and .md go beside it. Default
            experiments/results/<results>/<table>.csv for the whole, unchanged table; <folder>/<table>/<table>.csv
            for a part of it, or with a failed row; <table>-<hash>.csv there with something replaced.
        folder: Folder of the stages' results, as stages/<stage>-<hash>.
        slots: Number of stages that run at the same time; 0 means one per GPU, or one on a CPU.
        executor: local runs here; slurm submits job arrays through submitit.
        job: What each job requests.
        dry_run: Only print the commands, in order, and check their configurations.
    """
    given = {"settings": settings, "stages": stages, "metrics": metrics, "world": world, "results": results}
    changes = {key: value for key, value in given.items() if value is not None}
    tables = _folders([table] if isinstance(table, str) else table)
    if len(tables) > 1:
        own = {"rows": rows, "seeds": seeds, "output": output} | changes
        if keys := [f"--{key}" for key, value in own.items() if value is not None]:
            raise ValueError(f"{', '.join(keys)}: for one table at a time; {len(tables)} are given")
    contents, runs = Contents(folder), []
    for found in (read_table(place, changes) for place in tables):
        names, wanted = _names(rows, list(found.rows), "rows"), _numbers(seeds, found.seeds)
        if slots < 0:
            raise ValueError(f"slots: expected 0 or more, got {slots}")
        if output is not None and output.suffix != ".csv":
            raise ValueError(f"output: expected a file that ends in .csv, got {output}")
        planner = AblationPlanner(found, folder, compose, contents)
        whole = set(names) == set(found.rows) and set(wanted) >= set(found.seeds)
        targets = _targets(found, changes, whole, folder, output)
        runs.append(TableRun(planner, dict.fromkeys(wanted, names), targets))
    together = TableRuns(runs, PROGRAM, Console(emoji=False))
    if dry_run:
        together.tell_commands(executor, job)
    elif executor == "slurm":
        together.submit(job, folder / "jobs")
    elif len(runs) > 1:
        together.here(_slots(slots))
    else:
        with sweep_run(runs[0].table.name, names, wanted, PREFIX_OF_RESULTS) as log:
            log(together.here(_slots(slots))[0].values)


def _targets(table: Table, changes: dict[str, Any], whole: bool, folder: Path, output: Path | None) -> Targets:
    """Where results go; those of parts of a table, and of other tables, do not replace each other."""
    digest = text_digest(json.dumps(changes, sort_keys=True, default=str))[:8]
    stem = f"{table.name}-{digest}" if changes else table.name
    partial = folder / table.name / f"{stem}.csv"
    complete = RESULTS / table.results / partial.name if whole and not changes else partial
    return Targets(output or complete, output or partial)


def _folders(tables: list[str]) -> list[Path]:
    """The folders of tables in this order, each once; of every one for `all`.

    Raises:
        ValueError: none, or two of one name, whose results would take each other's place.
    """
    if not tables:
        raise ValueError(f"table: expected names such as experts, or {_ALL}")
    tables = [name for table in tables for name in (_known() if table == _ALL else [table])]
    places: dict[str, Path] = {}
    for folder in map(find_table, tables):
        if places.setdefault(folder.name, folder).resolve() != folder.resolve():
            raise ValueError(f"table: {places[folder.name]} and {folder} have one name")
    return list(places.values())


def _known() -> list[str]:
    return sorted(file.parent.name for file in TABLES.glob(f"*/{TABLE_FILE}"))


def find_table(table: str) -> Path:
    """The folder of a table.

    Raises:
        FileNotFoundError: it does not exist.
    """
    path = Path(table)
    for folder in (TABLES / table, path, path.parent):
        if (folder / TABLE_FILE).is_file() and (folder != path.parent or path.name == TABLE_FILE):
            return folder
    raise FileNotFoundError(f"table: no {TABLES / table / TABLE_FILE}{did_you_mean(table, _known())}")


def _names(value: str | list[str] | None, known: list[str], key: str) -> list[str]:
    if value is None:
        return known
    names = value.strip("[] ").split(",") if isinstance(value, str) else value
    names = list(dict.fromkeys(name.strip() for name in names))
    for name in names:
        if name not in known:
            raise ValueError(f"{key}: no row {name!r}{did_you_mean(name, known)}")
    return [name for name in known if name in names]


def _numbers(value: str | int | list[int] | None, default: Sequence[int]) -> list[int]:
    if value is None:
        return list(default)
    words = value.strip("[] ").split(",") if isinstance(value, str) else value
    try:
        numbers = [int(word) for word in (words if isinstance(words, list) else [words])]
    except ValueError:
        raise ValueError(f"seeds: expected whole numbers such as 0,1,2, got {value!r}") from None
    if not numbers or min(numbers) < 0:
        raise ValueError(f"seeds: expected whole numbers >= 0, got {value!r}")
    return list(dict.fromkeys(numbers))


def _slots(count: int) -> Slots:
    import torch  # only where stages run: it takes a second

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = tuple(str(number) for number in range(torch.cuda.device_count()))
    if visible and gpus:
        gpus = tuple(visible.split(","))[: len(gpus)]
    return Slots(count or len(gpus) or 1, gpus, cores())
