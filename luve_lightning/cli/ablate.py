"""`luve ablate`: runs the rows of one of the paper's tables, and writes the table."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from rich.console import Console

from luve_lightning.ablations.costs import add_costs, write_cost_plot
from luve_lightning.ablations.graph import AblationPlanner, Contents, Plan, Use, as_text, without
from luve_lightning.ablations.job_array import JobOptions, array_lines, stage_jobs, submit
from luve_lightning.ablations.output import RunWatcher, dry_run_lines, results_lines, start_line, sweep_run, uses
from luve_lightning.ablations.results import (
    Results,
    ResultsProvenance,
    collect,
    finished_rows,
    result_rows,
    write_results,
)
from luve_lightning.ablations.runners import LocalRunner, Slots
from luve_lightning.ablations.stage_process import is_done
from luve_lightning.ablations.table import TABLE_FILE, Table, read_table
from luve_lightning.cli import Verb
from luve_lightning.cli.compose import compose, escaped, read_arguments
from luve_lightning.cli.errors import describe_runtime_error, did_you_mean
from luve_lightning.cli.run_verb import refusal, run_verb
from luve_lightning.files import read_json, text_digest
from luve_lightning.machine import cores
from luve_lightning.reporting.dashboard import PREFIX_OF_RESULTS
from luve_lightning.revision import revision_in_words
from luve_lightning.terminal import say

VERBS = {
    "ablate": Verb(
        "Tables", "repeat one of the paper's tables: every row, several seeds", positional="table", goes_on=True
    )
}


TABLES = Path("experiments/ablations")
RESULTS = Path("experiments/results")
PROGRAM = (sys.executable, "-m", "luve_lightning")
_JOB = JobOptions()
_PACKAGES = ("luve-lightning", "torch", "lightning", "diffusers", "transformers", "peft", "numpy", "scipy")


def ablate(
    table: str,
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

    Args:
        table: Folder under experiments/ablations, or the path of a folder or of its table.yaml.
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
    found = read_table(find_table(table), changes)
    names = _names(rows, list(found.rows), "rows")
    wanted = _numbers(seeds, found.seeds)
    if slots < 0:
        raise ValueError(f"slots: expected 0 or more, got {slots}")
    if output is not None and output.suffix != ".csv":
        raise ValueError(f"output: expected a file that ends in .csv, got {output}")
    planner = AblationPlanner(found, folder, compose, Contents(folder))
    run = _Run(planner, dict.fromkeys(wanted, names), Console(emoji=False))
    if dry_run:
        run.tell_commands(executor, job)
        return
    whole = not changes and set(names) == set(found.rows) and set(wanted) >= set(found.seeds)
    # Runs of different tables do not replace each other's results.
    digest = text_digest(json.dumps(changes, sort_keys=True, default=str))[:8]
    stem = f"{found.name}-{digest}" if changes else found.name
    partial = folder / found.name / f"{stem}.csv"
    targets = _Targets(output or (RESULTS / found.results / partial.name if whole else partial), output or partial)
    if executor == "slurm":
        run.submit(job, targets, folder / "jobs")
    else:
        with sweep_run(found.name, names, wanted, PREFIX_OF_RESULTS) as log:
            log(run.here(_slots(slots), targets).values)


def find_table(table: str) -> Path:
    """The folder of a table.

    Raises:
        FileNotFoundError: it does not exist.
    """
    path = Path(table)
    for folder in (TABLES / table, path, path.parent):
        if (folder / TABLE_FILE).is_file() and (folder != path.parent or path.name == TABLE_FILE):
            return folder
    known = sorted(file.parent.name for file in TABLES.glob(f"*/{TABLE_FILE}"))
    raise FileNotFoundError(f"table: no {TABLES / table / TABLE_FILE}{did_you_mean(table, known)}")


@dataclass(frozen=True)
class _Targets:
    """Where the table goes: when every row and seed is there, and when some are missing."""

    whole: Path
    partial: Path


@dataclass(frozen=True)
class TableWriter:
    """Writes the table of what is finished; the last job of a job array.

    Attributes:
        wanted: requested rows of each seed.
        rows: these, and others that were finished before.
    """

    planner: AblationPlanner
    wanted: Mapping[int, Sequence[str]]
    rows: Mapping[int, Sequence[str]]
    targets: _Targets
    provenance: ResultsProvenance

    def __call__(self, reasons: Mapping[Use, str] | None = None) -> Path | None:
        """Write it and return the CSV's path; None where no row is finished, which replaces no table."""
        return self.write(self.results(), reasons)

    def results(self) -> Results:
        """What is finished, with what a video of each row costs."""
        found = collect(self.planner, self.rows)
        add_costs(found, self.planner, finished_rows(self.planner, self.rows), planned_video)
        return found

    def write(self, found: Results, reasons: Mapping[Use, str] | None = None) -> Path | None:
        """Write results; see `__call__`."""
        if not any(found.values.values()):
            return None
        failed: dict[str, dict[int, str]] = {}
        for seed, names in self.wanted.items():
            for row in names:
                if seed not in found.values.get(row, {}):
                    reason = (reasons or {}).get((row, seed), "not finished; see the logs of its stages")
                    failed.setdefault(row, {})[seed] = reason
        path = self.targets.partial if failed else self.targets.whole
        write_results(self.planner.table, found, failed, self.provenance, path)
        write_cost_plot(self.planner.table, result_rows(self.planner.table, found.values), path)
        return path


def planned_video(words: Sequence[str], changes: Mapping[str, Any]) -> dict[str, Any]:
    """What `luve plan` says of a `luve generate` command; see `costs.PlanVideo`."""
    arguments = read_arguments(words[1:])
    options = [*arguments.options, *((key, as_text(value)) for key, value in changes.items())]
    config: dict[str, Any] = {}
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        given, plan = Path(folder) / "generate.yaml", Path(folder) / "plan.json"
        # As a file, in which keys that make no difference to a plan are skipped. JSON is YAML.
        given.write_text(json.dumps(escaped(compose(arguments.files, options)), default=str), encoding="utf-8")
        # A named GPU: a plan measures one that is here, and the seconds are not used.
        rest = ["--config", str(given), "--output", str(plan), "--gpu", "h200"]
        try:
            run_verb("plan", rest, config)
        except Exception as error:
            # Also where it is a bug: the results of hours are not lost for a plan.
            raise ValueError(describe_runtime_error(error, config) or f"{type(error).__name__}: {error}") from error
        return read_json(plan)


class _Run:
    """One call of the command."""

    def __init__(self, planner: AblationPlanner, wanted: Mapping[int, Sequence[str]], console: Console) -> None:
        self.planner, self.wanted, self.console = planner, wanted, console
        self.table: Table = planner.table
        there = finished_rows(planner, {seed: list(self.table.rows) for seed in wanted})
        # Finished rows cost nothing, and stay in the table.
        self.rows = {
            seed: [row for row in self.table.rows if row in names or row in there[seed]]
            for seed, names in wanted.items()
        }

    def plan(self, lost: Collection[Use] = ()) -> Plan:
        return self.planner.plan(without(self.rows, lost))

    def tell_commands(self, executor: str, options: JobOptions) -> None:
        plan = self.plan()
        if executor == "local":
            lines = dry_run_lines(plan, PROGRAM)
        else:
            lines = array_lines(stage_jobs(self.planner, plan, self.rows, PROGRAM, {}), options)
        print("\n".join(lines), flush=True)
        refused: dict[str, list[str]] = {}
        for stage in plan.stages.values():
            if not is_done(stage) and (why := refusal(stage.words)):
                refused.setdefault(f"{stage.name}: {why}", []).append(f"{stage.label} ({uses(stage)})")
        for error, places in refused.items():
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            print(f"luve ablate: error: would fail: {error}; in {places[0]}{more}", file=sys.stderr)
        if refused:
            raise SystemExit(2)

    def here(self, slots: Slots, targets: _Targets) -> Results:
        say(self.console, f"{self.table.title}\n{start_line(self.plan(), slots)}")
        watcher = RunWatcher(self.console)
        runner = LocalRunner(self.plan, slots, PROGRAM, _facts(), watcher)
        try:
            with watcher:
                outcome = runner.run()
        except (KeyboardInterrupt, SystemExit):
            stages = self.plan().stages.values()
            done = sum(map(is_done, stages))
            say(
                self.console,
                f"stopped; {done} of {len(stages)} stages are finished, the same command continues from there",
            )
            raise
        reasons = {use: failure.reason for use, failure in outcome.lost.items()}
        found = self._finish(targets, reasons)
        if outcome.failures:
            raise SystemExit(1)
        return found

    def submit(self, options: JobOptions, targets: _Targets, folder: Path) -> None:
        jobs = stage_jobs(self.planner, self.plan(), self.rows, PROGRAM, _facts())
        writer = TableWriter(self.planner, self.wanted, self.rows, targets, _provenance())
        ids = submit(jobs, writer, folder, options)
        if options.cluster != "slurm":
            self._finish(targets, {})
            if any(not is_done(stage) for stage in self.plan().stages.values()):
                raise SystemExit(1)
            return
        arrays = ", ".join(f"{number} ({len(some)} jobs)" for number, some in zip(ids, jobs, strict=False))
        say(
            self.console,
            f"submitted: arrays {arrays}, then {ids[-1]}, which writes {targets.whole}\n"
            f"logs: {folder} and log.txt in each stage's folder; the same command later runs what failed",
        )

    def _finish(self, targets: _Targets, reasons: Mapping[Use, str]) -> Results:
        # Not those that failed here, even if another process has made them since: the evaluations lack them.
        rows = without(self.rows, reasons)
        writer = TableWriter(self.planner, self.wanted, rows, targets, _provenance())
        found = writer.results()
        path = writer.write(found, reasons)
        if path is None:
            say(self.console, "no row is finished: no table is written")
        else:
            for line in results_lines(self.table, result_rows(self.table, found.values), found.missing, path):
                self.console.print(line, soft_wrap=isinstance(line, str), highlight=False, markup=False)
        wanted = {(row, seed) for seed, names in self.wanted.items() for row in names}
        bad = {use: why for use, why in reasons.items() if use in wanted}
        if bad:
            say(self.console, "\nfailed; the same command runs what is missing again:")
            for (row, seed), why in sorted(bad.items()):
                say(self.console, f"  {row}, seed {seed}: {why}")
        return found


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


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{platform.machine()} CPU"


def _facts() -> dict[str, str]:
    return {"revision": revision_in_words(), "device": _device()}


def _provenance() -> ResultsProvenance:
    packages = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    return ResultsProvenance(
        shlex.join(["luve", *sys.argv[1:]]),
        revision_in_words(),
        _device(),
        {name: packages[name] for name in _PACKAGES if name in packages},
        datetime.now(UTC).isoformat(timespec="seconds"),
    )
