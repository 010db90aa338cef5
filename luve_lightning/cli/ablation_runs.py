"""Runs of tables: the stages of several in one pool, each table written when what it needs is there."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from luve_lightning.ablations.costs import add_costs, write_cost_plot
from luve_lightning.ablations.graph import (
    AblationPlanner,
    AblationStage,
    Plan,
    Use,
    as_text,
    own_uses,
    together,
    without,
)
from luve_lightning.ablations.job_array import JobOptions, StageJob, array_lines, stage_jobs, submit
from luve_lightning.ablations.output import RunWatcher, dry_run_lines, results_lines, start_line, uses
from luve_lightning.ablations.results import (
    Results,
    ResultsProvenance,
    collect,
    finished_rows,
    result_rows,
    write_results,
)
from luve_lightning.ablations.runners import LocalRunner, Slots, Standing
from luve_lightning.ablations.stage_process import is_done, is_whole, missing_stages
from luve_lightning.cli.compose import compose, escaped, read_arguments
from luve_lightning.cli.errors import describe_runtime_error
from luve_lightning.cli.run_verb import refusal, run_verb
from luve_lightning.files import read_json
from luve_lightning.revision import revision_in_words
from luve_lightning.terminal import say

_PACKAGES = ("luve-lightning", "torch", "lightning", "diffusers", "transformers", "peft", "numpy", "scipy")


@dataclass(frozen=True)
class Targets:
    """Where a table goes: when every row and seed is there, and when some are missing."""

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
    targets: Targets
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


class TableRun:
    """One table of a call of the command.

    Args:
        wanted: requested rows of each seed.
        targets: where its results go.
    """

    def __init__(self, planner: AblationPlanner, wanted: Mapping[int, Sequence[str]], targets: Targets) -> None:
        self.planner, self.wanted, self.targets = planner, wanted, targets
        self.table = planner.table
        # Finished rows stay in the table, unless they were to be made again for it.
        self.rows = self._with_others(is_done)
        plan = self.plan()
        if any(is_done(plan.stages[digest]) for digest in missing_stages(plan)):
            self.rows = self._with_others(is_whole)

    def _with_others(self, finished: Callable[[AblationStage], bool]) -> dict[int, list[str]]:
        """The requested rows of each seed, and others whose own stages are all finished."""
        there = finished_rows(self.planner, {seed: list(self.table.rows) for seed in self.wanted}, finished)
        return {
            seed: [row for row in self.table.rows if row in names or row in there[seed]]
            for seed, names in self.wanted.items()
        }

    def plan(self, lost: Collection[Use] = ()) -> Plan:
        """What to run, without the rows and seeds that are lost."""
        return self.planner.plan(without(self.rows, lost))

    def writer(self, lost: Collection[Use] = ()) -> TableWriter:
        """What writes the table without these."""
        return TableWriter(self.planner, self.wanted, without(self.rows, lost), self.targets, _provenance())

    def bad(self, reasons: Mapping[Use, str]) -> dict[Use, str]:
        """Why requested rows and seeds failed."""
        wanted = {(row, seed) for seed, names in self.wanted.items() for row in names}
        return {use: why for use, why in sorted(reasons.items()) if use in wanted}


class TableRuns:
    """One call of the command: a table, or several whose common stages are run once.

    Args:
        program: words before a command's own.
    """

    def __init__(self, runs: Sequence[TableRun], program: Sequence[str], console: Console) -> None:
        self.runs, self.program, self.console = list(runs), program, console

    def plan(self, lost: Collection[Use] = ()) -> Plan:
        """What to run for all tables, without the rows and seeds that are lost."""
        if len(self.runs) == 1:
            return self.runs[0].plan(lost)
        return together({run.table.name: run.plan(self._own(run, lost)) for run in self.runs})

    def tell_commands(self, executor: str, options: JobOptions) -> None:
        """Print every command, and refuse those whose configuration does not fit.

        Raises:
            SystemExit: with 2, where one does not.
        """
        plan = self.plan()
        lines = dry_run_lines(plan, self.program) if executor == "local" else array_lines(self._jobs({}), options)
        print("\n".join(lines), flush=True)
        refused: dict[str, list[str]] = {}
        missing = missing_stages(plan)
        for digest, stage in plan.stages.items():
            if digest in missing and (why := refusal(stage.words)):
                refused.setdefault(f"{stage.name}: {why}", []).append(f"{stage.label} ({uses(stage)})")
        for error, places in refused.items():
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            print(f"luve ablate: error: would fail: {error}; in {places[0]}{more}", file=sys.stderr)
        if refused:
            raise SystemExit(2)

    def here(self, slots: Slots) -> list[Results]:
        """Run what is missing on this machine, and write the tables; returns their results.

        Raises:
            SystemExit: with 1, where a stage failed.
        """
        say(self.console, f"{self._title()}\n{start_line(self.plan(), slots)}")
        watcher = RunWatcher(self.console) if len(self.runs) == 1 else _TablesWatcher(self.console, self.runs)
        runner = LocalRunner(self.plan, slots, self.program, _facts(), watcher)
        try:
            with watcher:
                outcome = runner.run()
        except (KeyboardInterrupt, SystemExit):
            plan = self.plan()
            done = len(plan.stages) - len(missing_stages(plan))
            say(
                self.console,
                f"stopped; {done} of {len(plan.stages)} stages are finished, the same command continues from there",
            )
            raise
        found = self._finish({use: failure.reason for use, failure in outcome.lost.items()})
        if outcome.failures:
            raise SystemExit(1)
        return found

    def submit(self, options: JobOptions, folder: Path) -> None:
        """Submit what is missing as job arrays, and a last job that writes the tables.

        Raises:
            SystemExit: with 1, where a stand-in for a cluster did not finish a stage.
        """
        jobs = self._jobs(_facts())
        ids = submit(jobs, _Writers(tuple(run.writer() for run in self.runs)), folder, options)
        if options.cluster != "slurm":
            self._finish({})
            if missing_stages(self.plan()):
                raise SystemExit(1)
            return
        arrays = ", ".join(f"{number} ({len(some)} jobs)" for number, some in zip(ids, jobs, strict=False))
        written = ", ".join(str(run.targets.whole) for run in self.runs)
        say(
            self.console,
            f"submitted: arrays {arrays}, then {ids[-1]}, which writes {written}\n"
            f"logs: {folder} and log.txt in each stage's folder; the same command later runs what failed",
        )

    def _title(self) -> str:
        if len(self.runs) == 1:
            return self.runs[0].table.title
        return f"{len(self.runs)} tables: {', '.join(run.table.name for run in self.runs)}"

    def _own(self, run: TableRun, lost: Collection[Use]) -> dict[Use, Use]:
        """A table's rows and seeds among those of the common plan, with their names there."""
        return {use: use for use in lost} if len(self.runs) == 1 else own_uses(run.table.name, lost)

    def _jobs(self, facts: Mapping[str, Any]) -> list[list[StageJob]]:
        return stage_jobs([(run.planner, run.plan(), run.rows) for run in self.runs], self.program, facts)

    def _finish(self, reasons: Mapping[Use, str]) -> list[Results]:
        found, errors = [], []
        bad: dict[str, str] = {}
        for run in self.runs:
            # Not those that failed here, even if another process has made them since: the evaluations lack them.
            own = {use: reasons[name] for use, name in self._own(run, reasons).items()}
            before = "" if len(self.runs) == 1 else f"{run.table.name}/"
            bad |= {f"{before}{row}, seed {seed}": why for (row, seed), why in run.bad(own).items()}
            try:
                found.append(self._write(run, own))
            except Exception as error:  # of one table: the others are written
                errors.append(error)
        if errors:
            raise errors[0]
        if bad:
            say(self.console, "\nfailed; the same command runs what is missing again:")
            for place, why in bad.items():
                say(self.console, f"  {place}: {why}")
        return found

    def _write(self, run: TableRun, reasons: Mapping[Use, str]) -> Results:
        writer = run.writer(reasons)
        found = writer.results()
        path = writer.write(found, reasons)
        if len(self.runs) > 1:
            say(self.console, f"{run.table.name}: {path or 'no row is finished, no table is written'}")
        elif path is None:
            say(self.console, "no row is finished: no table is written")
        else:
            for line in results_lines(run.table, result_rows(run.table, found.values), found.missing, path):
                self.console.print(line, soft_wrap=isinstance(line, str), highlight=False, markup=False)
        return found


class _TablesWatcher(RunWatcher):
    """Writes each table as soon as all its stages are done: a run of hours may be stopped."""

    def __init__(self, console: Console, runs: Sequence[TableRun]) -> None:
        super().__init__(console)
        self._missing = [(run, missing_stages(run.plan())) for run in runs]

    def __enter__(self) -> RunWatcher:
        super().__enter__()
        for run, missing in self._missing:
            if not missing:
                self._write(run)
        return self

    def finished(self, stage: AblationStage, seconds: float, standing: Standing) -> None:
        """See AblationWatcher."""
        super().finished(stage, seconds, standing)
        for run, missing in self._missing:
            if stage.digest in missing:
                missing.remove(stage.digest)
                if not missing:
                    self._write(run)

    def _write(self, run: TableRun) -> None:
        with suppress(Exception):  # said at the end, where it is written again
            say(self.console, f"{run.table.name}: {run.writer()()}")


@dataclass(frozen=True)
class _Writers:
    """Writes several tables; the last job of a job array."""

    writers: tuple[TableWriter, ...]

    def __call__(self) -> None:
        """Write them."""
        for writer in self.writers:
            writer()


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
