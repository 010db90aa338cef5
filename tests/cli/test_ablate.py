"""`luve ablate`: what it runs, prints and writes; its stages are a program that starts in an instant."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from luve_lightning.cli import ablate
from tests.helpers.ablations import PROGRAM, ROWS, TABLE, started, write_table
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
    monkeypatch.setattr(ablate, "refusal", lambda words: None)
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
    ("words", "errors"),
    [
        ([], []),
        (
            ["--settings.lr", "quick", "--stages.generate.options.stepz", "3"],
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
    errors: list[str],
) -> None:
    monkeypatch.chdir(repository)
    outcome = run_luve(capsys, "ablate", "placement", "--folder", tmp_path, "--dry_run", "true", *words)
    assert outcome.code == (2 if errors else 0)
    assert len(outcome.error_lines) == len(errors), outcome.err
    for line, start in zip(outcome.error_lines, errors, strict=True):
        assert re.match(".*".join(map(re.escape, start.split(" * "))), line)
        assert " more" in line, "rows and seeds with the same mistake are counted, not repeated"
    assert "# 51 of 51 stages to run" in outcome.out


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
    ],
)
def test_mistakes_are_one_line(luve: Luve, words: list[str], message: str) -> None:
    outcome = luve(*words)
    assert outcome.code == 2
    assert message in outcome.err
    assert len(outcome.error_lines) == 1
