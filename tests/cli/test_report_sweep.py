"""Sweeps are grids over the tables' rows and seeds; without an account the same grid runs here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from luve_lightning.ablations.output import sweep_run
from luve_lightning.ablations.table import read_table
from luve_lightning.cli import report as verb
from luve_lightning.cli.compose import read_arguments
from luve_lightning.cli.report import grid_words, sweep_configuration, why_no_account
from tests.helpers.run_luve import run_luve
from tests.helpers.wandb_file import OfflineRun

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = sorted(file.parent for file in (REPOSITORY / "experiments" / "ablations").glob("*/table.yaml"))
# config/schema.json of wandb's own package `sweeps` 0.3.0, which needs numpy 1 and so cannot be installed here.
SCHEMA = json.loads(Path(__file__).with_name("wandb_sweep_schema.json").read_text())
ACCOUNT = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC")


def stem(path: Path) -> str:
    return path.name


def configuration(folder: Path) -> dict[str, Any]:
    return sweep_configuration(read_table(folder), folder.name)


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ACCOUNT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `luve ablate` is called with, instead of its hours."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(verb, "ablate", lambda table, **options: found.append({"table": table, **options}))
    return found


@pytest.mark.parametrize("folder", FOLDERS, ids=stem)
def test_wandbs_schema_takes_it(folder: Path) -> None:
    jsonschema.Draft7Validator(SCHEMA).validate(configuration(folder))


def test_the_schema_refuses_what_is_no_sweep() -> None:
    good = configuration(FOLDERS[0])
    validator = jsonschema.Draft7Validator(SCHEMA)
    for wrong in ({"method": "gird"}, {"parameters": {"rows": {"values": "full"}}}, {"programme": "luve"}):
        assert not validator.is_valid(good | wrong), wrong


@pytest.mark.slow
def test_the_grid_and_the_metric_shown_are_the_tables() -> None:
    known = {folder.name: configuration(folder) for folder in FOLDERS}
    assert known["multi_scale"]["metric"] == {"name": "result/psnr_rgb_x1_5", "goal": "maximize"}
    assert known["experts"]["metric"] == {"name": "result/fd_patch_vae", "goal": "minimize"}
    assert known["placement"]["parameters"] == {
        "rows": {"values": ["full", "attention_modules", "swapped"]},
        "seeds": {"values": [1, 2, 3, 4, 5]},
    }
    assert known["rank"]["description"].startswith("Rank of the experts")
    assert "mini world" in known["rank"]["description"]


@pytest.mark.slow
def test_the_words_are_those_of_wandbs_agent() -> None:
    folder = REPOSITORY / "experiments" / "ablations" / "experts"
    table, config = read_table(folder), configuration(folder)
    given = {"args": {"rows": {"value": "full"}, "seeds": {"value": 2}}, "program": "luve"}
    # Here, since it takes as long to import as PyTorch.
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    values = create_sweep_command_args(given)
    template = create_sweep_command(config["command"])
    words = [word for part in template for word in (values["args"] if part == "${args}" else [part])]
    assert words[0] == "${env}"
    assert words[1:] in grid_words(table, "experts")
    assert len(grid_words(table, "experts")) == 8 * 10
    arguments = read_arguments(words[3:], "table")
    assert words[1:3] == ["luve", "ablate"]
    assert arguments.options == [("table", "experts"), ("rows", "full"), ("seeds", "2")]


def test_without_an_account_the_grid_runs_here(
    capsys: pytest.CaptureFixture[str], no_account: None, calls: list[dict[str, Any]]
) -> None:
    outcome = run_luve(capsys, "sweep", "placement")
    assert outcome.code == 0, outcome.err
    assert calls == [{"table": "placement", "rows": ["full", "attention_modules", "swapped"], "seeds": [1, 2, 3, 4, 5]}]
    assert outcome.out == (
        "no sweep, no account: neither WANDB_API_KEY nor a netrc entry of api.wandb.ai: "
        "the same 15 rows and seeds run here\n"
    )


def test_a_dry_run_prints_the_commands(
    capsys: pytest.CaptureFixture[str], no_account: None, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = "luve ablate placement --rows=full,attention_modules,swapped --seeds=1,2,3,4,5"
    lines = run_luve(capsys, "sweep", "placement", "--dry_run", "true").out.splitlines()
    assert lines[1:] == [together], "without an account, the one command that runs"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    lines = run_luve(capsys, "sweep", "placement", "--dry_run", "true").out.splitlines()
    assert lines[1] == "luve ablate placement --rows=full --seeds=1"
    assert (len(lines), lines[-1]) == (1 + 15 + 1, together)
    assert not calls


def test_with_an_account_a_sweep_is_created_and_an_agent_started(
    capsys: pytest.CaptureFixture[str], no_account: None, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    created, started = [], []

    def create(config: Any, **where: Any) -> str:
        created.append((config, where))
        return "abc"

    def start(words: list[str], env: dict[str, str], check: bool) -> Any:
        started.append((words[1:], env["PATH"].split(os.pathsep)[0]))
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(wandb, "sweep", create)
    monkeypatch.setattr(verb.subprocess, "run", start)
    outcome = run_luve(capsys, "sweep", "rank", "--entity", "me", "--count", "2")
    assert outcome.code == 0, outcome.err
    [(config, where)] = created
    assert (config["name"], where) == ("rank", {"entity": "me", "project": "luve-lightning"})
    agent = ["-m", "wandb", "agent", "--count", "2", "me/luve-lightning/abc"]
    assert started == [(agent, str(Path(sys.executable).parent))]
    assert [call["table"] for call in calls] == ["rank"]  # what is finished becomes the table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["expert"], "table: no experiments/ablations/expert/table.yaml; did you mean 'experts'?"),
        (["rank", "--count", "0"], "count: expected at least 1, or null for all, got 0"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], no_account: None, words: list[str], message: str) -> None:
    outcome = run_luve(capsys, "sweep", *words)
    assert outcome.code == 2
    assert message in outcome.error_lines[-1]


@pytest.mark.parametrize(
    ("environment", "netrc", "expected"),
    [
        ({}, "", "no account: neither WANDB_API_KEY nor a netrc entry of api.wandb.ai"),
        ({"WANDB_API_KEY": "k"}, "", None),
        ({}, "machine api.wandb.ai\n  login user\n  password k\n", None),
        ({}, "machine example.com\n  login user\n  password k\n", "no account: neither"),
        ({"WANDB_BASE_URL": "https://example.com"}, "machine example.com login user password k\n", None),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "", "WANDB_MODE is offline"),
    ],
)
def test_where_an_account_is_looked_for(
    monkeypatch: pytest.MonkeyPatch,
    no_account: None,
    tmp_path: Path,
    environment: dict[str, str],
    netrc: str,
    expected: str | None,
) -> None:
    (tmp_path / "netrc").write_text(netrc)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = why_no_account()
    assert found == expected or (expected and found and found.startswith(expected))


def test_a_run_of_a_sweep_logs_its_results_and_leaves_the_stages_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SWEEP_ID": "abc12345",
        "WANDB_RUN_ID": "run00001",
        "WANDB_DIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    import wandb

    wandb.finish()
    wandb.teardown()  # a session that another test began in this process would not read the environment again
    with sweep_run("experts", ["full"], [1], "result/") as log:
        # A stage is a process that inherits the environment: it must not write into this run.
        assert not {"WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SERVICE"} & set(os.environ)
        log({"full": {0: {"psnr_rgb": 9.0}, 1: {"psnr_rgb": 2.0}}, "other": {1: {"psnr_rgb": 5.0}}})
    assert os.environ["WANDB_SWEEP_ID"] == "abc12345"
    wandb.teardown()  # waits for the run's file
    run = OfflineRun(tmp_path)
    assert (run.run.sweep_id, run.run.run_id) == ("abc12345", "run00001")
    assert (run.run.run_group, run.run.job_type) == ("experts", "ablation")
    assert [run.config[key] for key in ("table", "row", "seed")] == ["experts", "full", "1"]
    assert run.last["result/psnr_rgb"] == 2.0


def test_without_a_sweep_nothing_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with sweep_run("experts", ["full"], [1], "result/") as log:
        log({"full": {1: {"psnr_rgb": 2.0}}})
    assert not list(tmp_path.iterdir())
