"""Job arrays through submitit's stand-ins for a cluster."""

from __future__ import annotations

import builtins
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from luve_lightning.ablations.graph import AblationPlanner
from luve_lightning.ablations.job_array import JobOptions, StageJob, array_lines, stage_jobs, submit
from luve_lightning.ablations.stage_process import is_done
from tests.helpers.ablations import PROGRAM, ROWS, keep_numbers_alone, planner_of, started, write_table


def jobs_of(planner: AblationPlanner) -> list[list[StageJob]]:
    rows = {0: list(planner.table.rows)}
    return stage_jobs([(planner, planner.plan(rows), rows)], PROGRAM, {})


class Last:
    """What the last job does, told by a file: jobs are other processes."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self) -> None:
        self.file.write_text("table")


def test_arrays_run_level_by_level_and_a_failing_row_stops_no_other(tmp_path: Path, log: Path) -> None:
    rows = deepcopy(ROWS)
    rows["low"]["stages"] = {"generate": {"options": {"fail": True}}}
    planner = planner_of(write_table(tmp_path / "small", rows=rows), tmp_path / "runs")
    levels = jobs_of(planner)
    assert [len(jobs) for jobs in levels] == [2, 1, 2, 1]
    ids = submit(levels, Last(tmp_path / "last"), tmp_path / "jobs", JobOptions(minutes=1, cluster="debug"))
    assert len(ids) == 5
    assert (tmp_path / "last").read_text() == "table"
    left = planner.plan({0: ["full", "plain"]})
    assert all(map(is_done, left.stages.values())), "evaluated without the row that failed"
    names = [name.partition("-")[0] for name in started(log)]
    assert sorted(names) == ["data", "evaluate", "expert", "generate", "generate", "generate"]
    # Submitted again: what is missing.
    assert [[job.name for job in jobs] for jobs in jobs_of(planner)] == [["generate"], ["evaluate"]]
    # And whatever that needs, where only the numbers were kept.
    keep_numbers_alone(tmp_path / "runs")
    assert [len(jobs) for jobs in jobs_of(planner)] == [2, 1, 2, 1]


@pytest.mark.slow
def test_a_job_in_a_process_of_its_own(tmp_path: Path, log: Path) -> None:
    """submitit pickles the job: all that it needs must survive that."""
    planner = planner_of(write_table(tmp_path / "small"), tmp_path / "runs")
    [first, *_] = jobs_of(planner)
    data = [job for job in first if job.name == "data"]
    submit([data], Last(tmp_path / "last"), tmp_path / "jobs", JobOptions(minutes=1, cluster="local"))
    assert is_done(data[0].planned())
    assert (tmp_path / "last").exists()


def test_a_job_without_what_it_needs_says_so(tmp_path: Path, log: Path) -> None:
    planner = planner_of(write_table(tmp_path / "small"), tmp_path / "runs")
    _, [expert], _, [evaluate] = jobs_of(planner)
    with pytest.raises(RuntimeError, match=r"expert-\w{12}: not run, because data-\w{12} is not done"):
        expert()
    with pytest.raises(RuntimeError, match="evaluate: not run, because a stage of every row of seed 0 failed"):
        evaluate()
    assert started(log) == []


def test_what_would_be_submitted(tmp_path: Path) -> None:
    planner = planner_of(write_table(tmp_path / "small"), tmp_path / "runs")
    levels = jobs_of(planner)
    lines = array_lines(levels, JobOptions(partition="gpu", gpus=2, minutes=30, cpus=8, mem=64, at_once=4))
    assert lines[0] == (
        "# LEVEL_1: sbatch --array=0-1%4 --time=30 --cpus-per-task=8 --mem=64G --gpus-per-node=2 --partition=gpu"
    )
    heads = [line for line in lines if "sbatch" in line]
    assert [line.rpartition(" ")[2] for line in heads[1:]] == [
        f"--dependency=afterany:$LEVEL_{number}" for number in (1, 2, 3)
    ]
    commands = [line for line in lines if not line.startswith("#")]
    stages = planner.plan({0: list(ROWS)}).stages.values()
    assert {line.split("fake_luve.py ")[1] for line in commands} == {" ".join(s.words) for s in stages}


def test_parameters_of_a_cluster() -> None:
    options = JobOptions(partition="gpu", gpus=2, minutes=30, cpus=8, mem=64, at_once=4)
    assert options.parameters() == {
        "timeout_min": 30,
        "cpus_per_task": 8,
        "mem_gb": 64,
        "gpus_per_node": 2,
        "slurm_array_parallelism": 4,
        "slurm_partition": "gpu",
    }


def test_arrays_depend_on_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On SLURM itself, whose executor is replaced by one that notes what it is asked."""
    import submitit

    asked: list[dict[str, Any]] = []

    class Executor:
        def __init__(self, folder: Path, cluster: str) -> None:
            assert cluster == "slurm"
            asked.append({})

        def update_parameters(self, **parameters: Any) -> None:
            asked[-1] |= parameters

        def batch(self) -> Executor:
            return self

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

        def submit(self, task: object) -> Any:
            return type("Job", (), {"job_id": f"{100 + len(asked)}_0"})

    monkeypatch.setattr(submitit, "AutoExecutor", Executor)
    levels = jobs_of(planner_of(write_table(tmp_path / "small"), tmp_path / "runs"))
    ids = submit(levels, Last(tmp_path / "last"), tmp_path, JobOptions())
    assert ids == ["101", "102", "103", "104", "105"]
    dependencies = [item.get("slurm_additional_parameters") for item in asked]
    assert dependencies == [None, *({"dependency": f"afterany:{number}"} for number in (101, 102, 103, 104))]


def test_submitit_is_asked_for_only_when_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_submitit(name: str, *rest: Any) -> Any:
        if name == "submitit":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_submitit)
    with pytest.raises(ValueError, match=r"executor: slurm needs submitit.*pip install 'luve-lightning\[slurm\]'"):
        submit([], Last(tmp_path / "last"), tmp_path, JobOptions())
