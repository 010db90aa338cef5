"""Runs the stages of tables as job arrays, one per level of their graph."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from luve_lightning.ablations.graph import AblationPlanner, AblationStage, Plan
from luve_lightning.ablations.stage_process import is_done, is_whole, missing_stages, run_stage

Cluster = Literal["slurm", "local", "debug"]


@dataclass(frozen=True)
class JobOptions:
    """What each job requests.

    Attributes:
        partition: partition of the cluster; None uses its default.
        gpus: GPUs per job.
        minutes: time limit.
        cpus: CPU cores per job.
        mem: memory per job, GB.
        at_once: most jobs of an array that run at the same time.
        cluster: slurm, or submitit's stand-ins for trying it out: local (processes here) and debug (this process).
    """

    partition: str | None = None
    gpus: int = 1
    minutes: int = 60
    cpus: int = 4
    mem: int = 32
    at_once: int = 64
    cluster: Cluster = "slurm"

    def parameters(self) -> dict[str, Any]:
        """Parameters for submitit's AutoExecutor; stand-ins get none of a cluster's, and no GPU to wait for."""
        common = {"timeout_min": self.minutes, "cpus_per_task": self.cpus, "mem_gb": self.mem}
        if self.cluster != "slurm":
            return common
        own = {"gpus_per_node": self.gpus, "slurm_array_parallelism": self.at_once}
        return common | own | ({} if self.partition is None else {"slurm_partition": self.partition})


@dataclass(frozen=True)
class StageJob:
    """A stage to run in a job.

    The rows of a stage that serves all of them are settled when it starts: those whose own stages are done.

    Attributes:
        planner: finds the stage, by its name, again.
        rows: rows of each seed.
        row: one that uses it.
        seed: likewise.
        program: words before the command's own.
        facts: recorded when it is finished.
    """

    planner: AblationPlanner
    rows: Mapping[int, Sequence[str]]
    name: str
    row: str
    seed: int
    program: tuple[str, ...]
    facts: Mapping[str, Any]

    def __call__(self) -> None:
        """Run the stage.

        Raises:
            RuntimeError: it failed, or a stage that it needs did.
        """
        plan = self._plan()
        stage = self._find(plan)
        for needed in map(plan.stages.__getitem__, stage.needs):
            if not is_whole(needed):
                raise RuntimeError(f"{stage.label}: not run, because {needed.label} is not done")
        if (failure := run_stage(stage, self.program, {}, self.facts)) is not None:
            raise RuntimeError("\n".join([failure.reason, *failure.tail]))

    def planned(self) -> AblationStage:
        """The stage as it is when no stage fails."""
        return self._find(self.planner.plan({self.seed: self.rows[self.seed]}))

    def _plan(self) -> Plan:
        """The current plan: a stage that serves all rows serves those whose own stages are done."""
        rows = self.rows[self.seed]
        if self.planned().gathers:
            rows = [row for row in rows if all(map(is_done, self.planner.before_gathering(row, self.seed)))]
        return self.planner.plan({self.seed: rows})

    def _find(self, plan: Plan) -> AblationStage:
        for stage in plan.stages.values():
            if stage.name == self.name and (stage.gathers or (self.row, self.seed) in stage.uses):
                return stage
        raise RuntimeError(f"{self.name}: not run, because a stage of every row of seed {self.seed} failed")


def stage_jobs(
    tables: Sequence[tuple[AblationPlanner, Plan, Mapping[int, Sequence[str]]]],
    program: Sequence[str],
    facts: Mapping[str, Any],
) -> list[list[StageJob]]:
    """The jobs of each level: the stages that are missing.

    Args:
        tables: what makes a table's plan, its plan, and the rows of each seed. A stage that several share is the job
            of the first.
        program: words before the command's own.
        facts: recorded with every finished stage.
    """
    levels: dict[int, dict[str, StageJob]] = {}
    for planner, plan, rows in tables:
        missing = missing_stages(plan)
        for number, level in enumerate(plan.levels()):  # a stage is on one level in all tables
            for stage in level:
                if stage.digest in missing:
                    row, seed = min(stage.uses)
                    job = StageJob(planner, rows, stage.name, row, seed, tuple(program), facts)
                    levels.setdefault(number, {}).setdefault(stage.digest, job)
    return [list(levels[number].values()) for number in sorted(levels)]


def submit(
    levels: Sequence[Sequence[StageJob]], last: Callable[[], Any], folder: Path, options: JobOptions
) -> list[str]:
    """Submit an array per level, each after the previous one, and a last job that writes the table.

    The stand-ins for a cluster have no dependencies; each level is waited for.

    Args:
        levels: jobs from `stage_jobs`.
        last: the last job's work.
        folder: for submitit's own files.
        options: every job's.

    Returns:
        The ids of the arrays, the last job's at the end.

    Raises:
        ValueError: submitit is not installed.
    """
    try:
        import submitit
    except ImportError:
        raise ValueError(
            "executor: slurm needs submitit, which is not installed: pip install 'luve-lightning[slurm]'"
        ) from None
    ids: list[str] = []
    for tasks in [*levels, [last]]:
        executor = submitit.AutoExecutor(folder=folder, cluster=options.cluster)
        executor.update_parameters(name="luve-ablate", **options.parameters())
        if ids and options.cluster == "slurm":
            # Afterwards, whatever the outcome: what depends on a failed stage says so itself, the rest continues.
            executor.update_parameters(slurm_additional_parameters={"dependency": f"afterany:{ids[-1]}"})
        with executor.batch():
            jobs = [executor.submit(task) for task in tasks]
        ids.append(str(jobs[0].job_id).partition("_")[0])
        if options.cluster != "slurm":
            for job in jobs:
                job.exception()  # waits; the results say what failed
    return ids


def array_lines(levels: Sequence[Sequence[StageJob]], options: JobOptions) -> list[str]:
    """What would be submitted, as `sbatch` takes it, with each array's commands."""
    given = {"time": options.minutes, "cpus-per-task": options.cpus, "mem": f"{options.mem}G"}
    given |= {"gpus-per-node": options.gpus} | ({"partition": options.partition} if options.partition else {})
    asked = " ".join(f"--{key}={value}" for key, value in given.items())
    lines = []
    for number, jobs in enumerate(levels, 1):
        after = f" --dependency=afterany:$LEVEL_{number - 1}" if number > 1 else ""
        lines.append(f"# LEVEL_{number}: sbatch --array=0-{len(jobs) - 1}%{options.at_once} {asked}{after}")
        for index, job in enumerate(jobs):
            stage = job.planned()
            lines.append(f"#   {index}: {stage.label}")
            lines.append(shlex.join([*job.program, *stage.words]))
    lines.append(f"# and a last job, --dependency=afterany:$LEVEL_{len(levels)}, that writes the table")
    return lines
