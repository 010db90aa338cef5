"""`luve ablate`: what it runs, prints and writes; its stages are a program that starts in an instant."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from luve_lightning.ablations.output import RunWatcher
from luve_lightning.cli import ablate, ablation_runs
from tests.helpers.ablations import PROGRAM, ROWS, TABLE, keep_numbers_alone, started, write_table
from tests.helpers.run_luve import Outcome, run_luve

Luve = Callable[..., Outcome]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


@pytest.fixture
def luve(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: Path) -> Luve:
    """Runs the verb in a folder with the table `small`."""
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.setattr(ablate, "PROGRAM", PROGRAM)
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "experiments" / "ablations" / "small")
    return lambda *words: run_luve(capsys, "ablate", *words)


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {row["row"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_the_whole_table(luve: Luve, log: Path) -> None:
    outcome = luve("small", "--slots", "2")
    assert outcome.code == 0, outcome.err
    rows = rows_of(Path("experiments/results/tiny/small.csv"))
    assert {name: (row["mean"], row["seeds"]) for name, row in rows.items()} == {
        "full": ("5.5", "2"),
        "low": ("3.5", "2"),
        "plain": ("5.5", "2"),
    }
    assert rows["low"]["direction"] == "same"
    assert len(started(log)) == 11
    assert TABLE["world"] in outcome.out
    assert "\n11 of 11 stages to run, 2 at the same time\n" in outcome.out
    assert "11 of 11  evaluate-" in outcome.out
    content = json.loads(Path("experiments/results/tiny/small.json").read_text())
    assert content["packages"].keys() >= {"torch", "lightning"}
    assert Path("experiments/results/tiny/small.md").is_file()
    # Again: nothing to run, the same numbers.
    again = luve("small")
    assert again.code == 0
    assert "\nall 11 stages are finished already\n" in again.out
    assert len(started(log)) == 11
    assert rows_of(Path("experiments/results/tiny/small.csv")) == rows


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "experiments/ablations/small", "experiments/ablations/small/table.yaml"])
def test_a_part_of_the_table_does_not_replace_the_whole(luve: Luve, log: Path, name: str) -> None:
    outcome = luve(name, "--rows", "low", "--seeds", "1")
    assert outcome.code == 0, outcome.err
    assert list(rows_of(Path("runs/ablations/small/small.csv"))) == ["low"]
    assert not Path("experiments/results").exists()
    # What was finished stays in the table of a later part.
    assert luve(name, "--rows=full", "--seeds=[1]").code == 0
    rows = rows_of(Path("runs/ablations/small/small.csv"))
    assert list(rows) == ["full", "low"]
    assert rows["low"]["difference"] == "-2"
    # Without its videos it would have to be made again to be measured beside others.
    keep_numbers_alone(Path("runs/ablations"))
    before = len(started(log))
    assert luve(name, "--rows=plain", "--seeds=[1]").code == 0
    assert list(rows_of(Path("runs/ablations/small/small.csv"))) == ["plain"]
    assert len(started(log)) == before + 2


@pytest.mark.slow
def test_what_is_laid_over_does_not_replace_the_table_either(luve: Luve, log: Path, tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").write_text(yaml.safe_dump({"settings": {"value": 8.0}, "world": "another world"}))
    outcome = luve("--config", "quick.yaml", "small", "--seeds", "0", "--output", "out/mine.csv")
    assert outcome.code == 0, outcome.err
    rows = rows_of(Path("out/mine.csv"))
    assert (rows["full"]["mean"], rows["low"]["mean"]) == ("8", "3")
    content = json.loads(Path("out/mine.json").read_text())
    assert (content["world"], content["settings"]) == ("another world", {"value": 8.0})
    for value in ("7", "9"):
        assert luve("small", "--settings.value", value, "--seeds", "0").code == 0
    tables = [rows_of(path) for path in Path("runs/ablations/small").glob("small-*.csv")]
    assert {rows["full"]["mean"] for rows in tables} == {"7", "9"}
    assert not Path("experiments/results").exists()


@pytest.mark.slow
def test_a_run_without_a_finished_row_replaces_no_table(luve: Luve, log: Path, tmp_path: Path) -> None:
    assert luve("small", "--output", "mine.csv").code == 0
    before = Path("mine.csv").read_bytes()
    failing = {"stages": {"generate": {"options": {"fail": True}}}}
    (tmp_path / "failing.yaml").write_text(yaml.safe_dump(failing))
    outcome = luve("--config", "failing.yaml", "small", "--output", "mine.csv")
    assert outcome.code == 1
    assert "no row is finished: no table is written" in outcome.out
    assert Path("mine.csv").read_bytes() == before


@pytest.mark.slow
def test_a_failing_row_is_reported_and_the_others_are_there(luve: Luve, log: Path, tmp_path: Path) -> None:
    rows = deepcopy(ROWS)
    rows["low"]["stages"] = {"generate": {"options": {"fail": True}}}
    folder = write_table(tmp_path / "experiments" / "ablations" / "small", rows=rows)
    outcome = luve("small")
    assert outcome.code == 1
    words = " ".join(outcome.out.split())
    assert "FAILED generate-" in words
    assert "first line it broke here log: runs/ablations/stages/generate-" in words
    assert "low, seed 0: generate ended with exit status 3: it broke here" in words
    assert not Path("experiments/results").exists(), "a table with holes replaces none"
    table = Path("runs/ablations/small/small.csv")
    assert list(rows_of(table)) == ["full", "plain"]
    assert json.loads(table.with_suffix(".json").read_text())["failed"]["low"]["1"].endswith("it broke here")
    before = len(started(log))
    write_table(folder)
    assert luve("small").code == 0
    names = sorted(name.partition("-")[0] for name in started(log)[before:])
    assert names == ["evaluate", "evaluate", "generate", "generate"]
    assert list(rows_of(Path("experiments/results/tiny/small.csv"))) == ["full", "low", "plain"]


def test_a_dry_run_prints_every_command(luve: Luve, monkeypatch: pytest.MonkeyPatch, log: Path) -> None:
    # The program that starts in an instant takes words that luve itself would refuse.
    monkeypatch.setattr(ablation_runs, "refusal", lambda words: None)
    outcome = luve("small", "--rows", "full", "--seeds", "0", "--dry_run", "true")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert [line.split()[1].partition("-")[0] for line in lines if line.startswith("# ")][:-1] == [
        "data",
        "expert",
        "generate",
        "evaluate",
    ]
    assert lines[-1] == "# 4 of 4 stages to run"
    assert not started(log)
    assert not Path("runs").exists()
    # The commands are what runs: a shell makes the same of them.
    for line in lines:
        subprocess.run(line, shell=True, check=True)
    assert len(started(log)) == 4
    outcome = luve("small", "--dry_run", "true", "--executor", "slurm", "--job.partition", "big")
    assert "# LEVEL_1: sbatch --array=0-2%64 --time=60" in outcome.out
    assert "--partition=big" in outcome.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "stages", "errors"),
    [
        (["--seeds", "1"], 11, []),
        (
            ["--seeds", "1,2", "--settings.lr", "quick", "--stages.generate.options.stepz", "3"],
            21,
            [
                *(
                    f"luve ablate: error: would fail: {name}: model.init_args: * lr * quick * in {name}-"
                    for name in ("lfe", "hfe")
                ),
                "luve ablate: error: would fail: generate: stepz: unknown key; did you mean 'steps'?; in generate-",
            ],
        ),
    ],
)
def test_a_dry_run_checks_what_each_command_is_given(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    repository: Path,
    words: list[str],
    stages: int,
    errors: list[str],
) -> None:
    monkeypatch.chdir(repository)
    outcome = run_luve(capsys, "ablate", "placement", "--folder", tmp_path, "--dry_run", "true", *words)
    assert outcome.code == (2 if errors else 0)
    assert len(outcome.error_lines) == len(errors), outcome.err
    for line, start in zip(outcome.error_lines, errors, strict=True):
        assert re.match(".*".join(map(re.escape, start.split(" * "))), line)
        assert " more" in line, "rows and seeds with the same mistake are counted, not repeated"
    assert f"# {stages} of {stages} stages to run" in outcome.out


def second_table(fail: str = "") -> None:
    """A table `second` that shares its data and experts with `small`, and has the rows full and high."""
    table = deepcopy(TABLE) | {"rows": ["full", "high"], "settings": {"value": 6.0}, "title": "Second table"}
    rows = {"full": {}, "high": {"settings": {"value": 8.0}}}
    if fail:
        table["stages"][fail]["options"]["fail"] = True
    write_table(Path("experiments/ablations/second"), table, rows)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["small", "second"], ["small", "all"]])
def test_what_two_tables_share_is_run_once(luve: Luve, log: Path, words: list[str]) -> None:
    second_table()
    outcome = luve(*words, "--slots", "3")
    assert outcome.code == 0, outcome.err
    names = [name.partition("-")[0] for name in started(log)]
    assert Counter(names) == {"data": 1, "expert": 2, "generate": 10, "evaluate": 4}
    assert len(set(started(log))) == 17
    assert "2 tables: " in outcome.out
    assert "\n17 of 17 stages to run, 3 at the same time\n" in outcome.out
    together = {}
    for name, means in (("small", ["5.5", "3.5", "5.5"]), ("second", ["6.5", "8.5"])):
        path = Path(f"experiments/results/tiny/{name}.csv")
        together[path] = path.read_bytes()
        assert [row["mean"] for row in rows_of(path).values()] == means
        assert f"{name}: {path}" in outcome.out
        assert luve(name).code == 0
        assert path.read_bytes() == together[path], "what the table by itself writes"
    assert luve(*words).code == 0
    assert len(started(log)) == 17


@pytest.mark.slow
def test_a_table_is_written_when_its_stages_are_done(luve: Luve, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second_table()
    ready: list[str] = []
    say = RunWatcher.finished

    def finished(self: RunWatcher, stage: Any, *rest: Any) -> None:
        ready.append("+".join(sorted(path.stem for path in Path("experiments/results/tiny").glob("*.csv"))))
        say(self, stage, *rest)

    monkeypatch.setattr(RunWatcher, "finished", finished)
    assert luve("small", "--seeds", "0,1").code == 0
    Path("experiments/results/tiny/small.csv").unlink()
    log.unlink()
    Path(next(Path("runs/ablations/stages").glob("evaluate-*/done.json"))).unlink()
    assert luve("small", "second").code == 0
    assert ready[-1] == "small", "small's last evaluation was done before second's"


@pytest.mark.slow
def test_a_failure_stops_only_what_needs_it(luve: Luve, log: Path) -> None:
    second_table(fail="generate")
    outcome = luve("second", "small")
    assert outcome.code == 1
    assert list(rows_of(Path("experiments/results/tiny/small.csv"))) == ["full", "low", "plain"]
    assert not Path("experiments/results/tiny/second.csv").exists()
    assert "second: no row is finished, no table is written" in outcome.out
    assert "second/high, seed 1: generate ended with exit status 3: it broke here" in outcome.out
    before = len(started(log))
    second_table()
    assert luve("second", "small").code == 0
    names = Counter(name.partition("-")[0] for name in started(log)[before:])
    assert names == {"generate": 4, "evaluate": 2}
    # One that both tables need: plain, which needs no expert, is in one of them.
    for folder in ("small", "second"):
        path = Path(f"experiments/ablations/{folder}/table.yaml")
        table = yaml.safe_load(path.read_text())
        table["stages"]["data"]["options"]["fail"] = True
        path.write_text(yaml.safe_dump(table, sort_keys=False))
    outcome = luve("second", "small")
    assert outcome.code == 1
    assert outcome.out.count("FAILED") == 1
    assert list(rows_of(Path("runs/ablations/small/small.csv"))) == ["plain"]


@pytest.mark.slow
def test_a_dry_run_of_two_tables_has_each_command_once(luve: Luve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation_runs, "refusal", lambda words: None)
    second_table()
    outcome = luve("small", "second", "--dry_run", "true")
    assert outcome.out.splitlines()[-1] == "# 17 of 17 stages to run"
    assert "# data-" in outcome.out
    assert "(4 rows; seeds 0, 1)" in outcome.out, "rows of both tables that use the data"
    outcome = luve("small", "second", "--dry_run", "true", "--executor", "slurm")
    assert [line.split()[3] for line in outcome.out.splitlines() if "sbatch" in line] == [
        "--array=0-2%64",
        "--array=0-1%64",
        "--array=0-7%64",
        "--array=0-3%64",
    ]


@pytest.mark.slow
def test_job_arrays_of_two_tables(luve: Luve, log: Path) -> None:
    second_table()
    outcome = luve("small", "second", "--executor", "slurm", "--job.cluster", "debug", "--job.minutes", "1")
    assert outcome.code == 0, outcome.err
    assert len(started(log)) == len(set(started(log))) == 17
    assert rows_of(Path("experiments/results/tiny/second.csv"))["high"]["mean"] == "8.5"
    assert rows_of(Path("experiments/results/tiny/small.csv"))["low"]["mean"] == "3.5"


@pytest.mark.slow
def test_a_job_array_by_submitits_stand_in(luve: Luve, log: Path) -> None:
    outcome = luve("small", "--executor", "slurm", "--job.cluster", "debug", "--job.minutes", "1")
    assert outcome.code == 0, outcome.err
    assert rows_of(Path("experiments/results/tiny/small.csv"))["low"]["mean"] == "3.5"
    assert len(started(log)) == 11


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["smal"], "table: no experiments/ablations/smal/table.yaml; did you mean 'small'"),
        (["small", "--rows", "ful"], "rows: no row 'ful'; did you mean 'full'"),
        (["small", "--seeds", "a"], "seeds: expected whole numbers such as 0,1,2, got 'a'"),
        (["small", "--seeds", "-1"], "seeds: expected whole numbers >= 0, got '-1'"),
        (["small", "--seeds", "[]"], "seeds: expected whole numbers >= 0, got []"),
        (["small", "--slots", "-1"], "slots: expected 0 or more, got -1"),
        (["small", "--output", "a.md"], "output: expected a file that ends in .csv, got a.md"),
        (["small", "--stages.data.verbs", "x"], "stages.data.verbs: unknown key"),
        (["small", "--settings.valu", "3"], "settings.valu: unknown key; known: value"),
        (["small", "--rowz", "full"], "rowz"),
        ([], "table: required"),
        (["--table", "[]"], "table: expected names such as experts, or all"),
        (["small", "smal"], "table: no experiments/ablations/smal/table.yaml; did you mean 'small'"),
        (["small", "other/small"], "table: experiments/ablations/small and other/small have one name"),
        (
            ["small", "second", "--rows", "full", "--seeds", "0", "--settings.value", "3"],
            "--rows, --seeds, --settings: for one table at a time; 2 are given",
        ),
        (
            ["all", "--output", "a.csv", "--results", "mine"],
            "--output, --results: for one table at a time; 2 are given",
        ),
    ],
)
def test_mistakes_are_one_line(luve: Luve, words: list[str], message: str) -> None:
    for folder in ("experiments/ablations/second", "other/small"):
        write_table(Path(folder))
    outcome = luve(*words)
    assert outcome.code == 2
    assert message in outcome.err
    assert len(outcome.error_lines) == 1
