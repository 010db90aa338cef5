"""The `luve` command as a user meets it: errors, runs, resumes, interruption."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from luve_lightning.cli import verbs
from tests.helpers.luve_process import LuveProcess
from tests.helpers.run_luve import run_luve
from tests.helpers.waiting import wait_for

CONFIG: dict[str, Any] = {
    "trainer": {
        "default_root_dir": "???",
        "max_steps": 2,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    },
    "model": {
        "class_path": "tests.helpers.tiny.TinyModule",
        "init_args": {"lr": 0.01, "losses": {"l1": {"class_path": "torch.nn.L1Loss"}}},
    },
    "data": {"class_path": "tests.helpers.tiny.TinyData"},
    "callbacks": {
        "checkpoint": {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": "${trainer.default_root_dir}/checkpoints", "save_last": True},
        },
        "timer": {"class_path": "lightning.pytorch.callbacks.Timer"},
    },
    "loggers": {
        "csv": {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": "${trainer.default_root_dir}", "name": "", "version": ""},
        }
    },
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    return file


@pytest.fixture
def base(tmp_path: Path, config: Path) -> list[str]:
    """The words that name the configuration and the run folder."""
    return ["--config", str(config), "--trainer.default_root_dir", str(tmp_path / "run")]


def checkpoint(folder: Path) -> dict[str, Any]:
    import torch

    loaded: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return loaded


# Errors: one line, exit code 2, the key and what was expected; ` * ` stands for another package's words

ERRORS = [
    ("fitt", "luve fitt: error: no such verb; did you mean 'fit'?"),
    ("fit stray", "unexpected argument 'stray'"),
    ("fit --config nosuch.yaml", "--config: no such file: nosuch.yaml"),
    ("fit", "data, model: required, but not given; start from a configuration"),
    ("fit --max_steps 5", "max_steps: unknown key; did you mean 'trainer.max_steps'?"),
    ("BASE --shares 1", "shares: unknown key; did you mean 'data.share'?"),
    ("train", "luve train: error: no such verb; did you mean 'fit'?"),
    ("help nosuch", "luve nosuch: error: no such verb"),
    ("BASE --model.lr abc", "model.init_args: * lr * float * abc"),
    ("BASE --model.lrr 1", "model.init_args.lrr: unknown key; did you mean 'lr'?"),
    ("BASE --model.lr -1", "model.init_args.lr: lr must be > 0, got -1.0"),
    ("BASE --model.backbone nosuch", "model.init_args.backbone: backbone folder not found: nosuch"),
    ("BASE --model tests.helpers.tiny.Tin", "model.class_path: cannot import 'tests.helpers.tiny.Tin'"),
    ("BASE --model tests.helpers.tiny.TinyData", "model * TinyData * LightningModule"),
    ("BASE --model.losses.l1.reductio sum", "model.init_args.losses.l1.init_args.reductio: unknown key; did you"),
    ("BASE --data.batch_size 2.5", "data.init_args: * batch_size * int * 2.5"),
    ("BASE --data.share 2", "data.init_args.share: share must be in [0, 1], got 2.0"),
    ("BASE --data null", "data: required, but not given"),
    ("BASE --model luve_lightning.tasks.ExpertTask", "model.init_args: * backbone * expert.place * name"),
    ("BASE --trainer.max_step 3", "trainer.max_step: unknown key; did you mean 'max_steps'?"),
    ("BASE --trainer.max_steps many", "trainer.max_steps * int * many"),
    ("BASE --trainer.precision bf16-mixd", "trainer.precision * bf16-mixed * bf16-mixd"),
    ("BASE --trainer.accelerator warp", "trainer.accelerator: You selected an invalid accelerator name"),
    ("BASE --trainer.logger false", "trainer.logger: unknown key; loggers is a dictionary by name"),
    ("BASE --callbacks.checkpoint.save_top_k x", "callbacks.checkpoint.init_args: * save_top_k * int * x"),
    ("BASE --callbacks.checkpoint.save_top_k 4", "callbacks.checkpoint: ModelCheckpoint(save_top_k=4, monitor=None)"),
    ("BASE --loggers.csv.save_dir null", "loggers.csv.init_args: * save_dir"),
    ("BASE --seed_everything abc", "seed_everything * int * abc"),
    ("BASE --extra 3", "extra: unknown key"),
    ("BASE --ckpt_path nosuch.ckpt", "ckpt_path: no such file: nosuch.ckpt"),
]


@pytest.mark.parametrize(("words", "message"), ERRORS, ids=[words for words, _ in ERRORS])
def test_an_error_is_one_line(
    capsys: pytest.CaptureFixture[str], base: list[str], tmp_path: Path, words: str, message: str
) -> None:
    expanded = [part for word in words.split() for part in (["fit", *base] if word == "BASE" else [word])]
    outcome = run_luve(capsys, *expanded)
    assert outcome.code == 2
    assert re.search(".*".join(map(re.escape, message.split(" * "))), outcome.error_lines[-1])
    assert "Traceback" not in outcome.err
    lines = [line for line in outcome.error_lines if line.startswith("luve ")]
    assert len(lines) == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], base: list[str]) -> None:
    outcome = run_luve(capsys, "fit", *base, "--model.lr", "-1", "--debug")
    assert outcome.code == 2
    assert 'raise ValueError(f"lr must be > 0, got {lr}")' in outcome.err
    assert outcome.error_lines[-1] == "luve fit: error: model.init_args.lr: lr must be > 0, got -1.0"


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str], base: list[str]) -> None:
    outcome = run_luve(capsys, "fit", *base, "--model.fail_at", 1)
    assert outcome.code == 1
    assert "KeyError: 'a bug'" in outcome.err
    assert outcome.error_lines[-1] == "luve fit: internal error: KeyError, traceback above"


def test_measuring_without_a_checkpoint_is_refused(capsys: pytest.CaptureFixture[str], base: list[str]) -> None:
    outcome = run_luve(capsys, "test", *base, "--ckpt_path", "last")
    assert outcome.code == 2
    assert "ckpt_path: no last checkpoint in " in outcome.error_lines[-1]


# Runs


def test_a_run_leaves_its_checkpoint_configuration_and_provenance(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, base: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with caplog.at_level("INFO"):
        outcome = run_luve(capsys, "fit", *base, "--seed_everything", 0)
    assert outcome.code == 0, outcome.err
    assert not any(f" {word}" in f" {m}" for m in caplog.messages for word in ("Tip:", "TPU", "Seed", "`Trainer.fit`"))
    begin, end = outcome.out.split("luve fit: ")
    assert "  model   TinyModule, 5 parameters trained, 0 frozen\n" in begin
    assert f"  folder  {run}, seed 0\n" in begin
    assert end.startswith("2 of 2 steps, ")
    assert f"  checkpoint  {run}/checkpoints/last.ckpt\n" in end
    assert f"  log         {run}/metrics.csv\n" in end
    command = shlex.join(["luve", "test", *base, "--seed_everything", "0", "--ckpt_path", "last"])
    assert end.endswith(f"  next        {command}\n")
    assert (run / "metrics.csv").is_file()  # the logger's interpolation followed the option
    saved = checkpoint(run)
    assert saved["global_step"] == 2
    assert saved["hyper_parameters"]["lr"] == 0.01  # plain values: the checkpoint loads with weights_only
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["trainer"]["default_root_dir"] == str(run)
    assert written["seed_everything"] == 0
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["verb"] == "fit"
    assert provenance["command"].startswith("luve fit --config ")
    assert provenance["data_manifest"] == "0" * 64
    assert provenance["packages"]["torch"]


def test_the_written_configuration_repeats_the_run(
    capsys: pytest.CaptureFixture[str], base: list[str], tmp_path: Path
) -> None:
    assert run_luve(capsys, "fit", *base).code == 0
    again = tmp_path / "again"
    outcome = run_luve(
        capsys,
        "fit",
        "--config",
        tmp_path / "run" / "config.yaml",
        "--trainer.default_root_dir",
        again,
        "--callbacks.checkpoint.dirpath",
        again / "checkpoints",
        "--loggers",
        "null",
    )
    assert outcome.code == 0, outcome.err
    first, second = checkpoint(tmp_path / "run"), checkpoint(again)
    for key, value in first["state_dict"].items():
        assert value.equal(second["state_dict"][key])


@pytest.mark.slow
def test_resume_goes_on_and_adds_provenance(
    capsys: pytest.CaptureFixture[str], base: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # The first time there is nothing to resume from: one command serves both.
    assert run_luve(capsys, "fit", *base, "--ckpt_path", "last").code == 0
    first = (run / "config.yaml").read_bytes()
    assert run_luve(capsys, "fit", *base, "--ckpt_path", "last", "--trainer.max_steps", 4).code == 0
    assert checkpoint(run)["global_step"] == 4
    assert run_luve(capsys, "test", *base, "--ckpt_path", "last").code == 0
    assert (run / "config.yaml").read_bytes() == first
    verbs = [json.loads((run / f"provenance{n}.json").read_text())["verb"] for n in ("", "-2", "-3")]
    assert verbs == ["fit", "fit", "test"]
    assert yaml.safe_load((run / "config-2.yaml").read_text())["trainer"]["max_steps"] == 4


def test_a_later_file_adds_and_switches_off(
    capsys: pytest.CaptureFixture[str], base: list[str], tmp_path: Path
) -> None:
    later = tmp_path / "later.yaml"
    later.write_text(
        "callbacks:\n"
        "  checkpoint: null\n"
        "  summary: {class_path: lightning.pytorch.callbacks.ModelSummary}\n"
        "loggers: {csv: null}\n"
        "trainer: {enable_checkpointing: false}\n"
        "model: {init_args: {losses: {l1: null, mse: {class_path: torch.nn.MSELoss}}}}\n"
    )
    outcome = run_luve(capsys, "fit", *base, "--config", later, "--print_config")
    assert outcome.code == 0, outcome.err
    printed = yaml.safe_load(outcome.out)
    assert set(printed["callbacks"]) == {"timer", "summary"}
    assert not printed.get("loggers")
    losses = printed["model"]["init_args"]["losses"]
    assert {name: loss["class_path"] for name, loss in losses.items()} == {"mse": "torch.nn.MSELoss"}
    assert not (tmp_path / "run").exists()
    assert run_luve(capsys, "fit", *base, "--config", later).code == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "config.yaml",
        "measured.json",
        "provenance.json",
    ]


def test_texts_are_literal_and_what_is_written_down_repeats_them(
    capsys: pytest.CaptureFixture[str], base: list[str], tmp_path: Path
) -> None:
    text = "${trainer.max_steps} {a|b} #5 \u2028 '~'"
    words = ["--loggers.wandb", "lightning.pytorch.loggers.WandbLogger", "--loggers.wandb.offline", "true"]
    words += ["--loggers.csv.prefix", "null", "--loggers.wandb.notes", text, "--loggers.wandb.name", "#1"]
    printed = run_luve(capsys, "fit", *base, *words, "--print_config")
    assert printed.code == 0, printed.err
    again = tmp_path / "again.yaml"
    again.write_text(printed.out, encoding="utf-8")
    for outcome in (printed, run_luve(capsys, "fit", "--config", again, "--print_config")):
        assert outcome.code == 0, outcome.err
        loggers = yaml.safe_load(outcome.out)["loggers"]
        assert loggers["csv"]["init_args"]["prefix"] == "null"
        assert loggers["wandb"]["init_args"]["name"] == "#1"
        assert loggers["wandb"]["init_args"]["notes"] == "\\" + text
    assert printed.out == outcome.out


def test_the_run_folder_is_one_wherever_home_is_written(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    outcome = run_luve(capsys, "fit", "--config", config, "--trainer.default_root_dir=~/run")
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "~").exists()
    assert (tmp_path / "home/run/checkpoints/last.ckpt").is_file()
    assert (tmp_path / "home/run/config.yaml").is_file()


def test_a_pipe_is_a_configuration(capsys: pytest.CaptureFixture[str], base: list[str]) -> None:
    """What `--config <(echo ...)` is in a shell: a file that can be read once."""
    reading, writing = os.pipe()
    try:
        os.write(writing, b"trainer: {max_steps: 7}\n")
        os.close(writing)
        outcome = run_luve(capsys, "fit", *base, "--config", f"/dev/fd/{reading}", "--print_config")
    finally:
        os.close(reading)
    assert outcome.code == 0, outcome.err
    assert yaml.safe_load(outcome.out)["trainer"]["max_steps"] == 7


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_the_other_verbs_run(capsys: pytest.CaptureFixture[str], base: list[str], tmp_path: Path, verb: str) -> None:
    outcome = run_luve(capsys, verb, *base)
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["verb"] == verb


def test_fast_dev_run_writes_no_provenance(capsys: pytest.CaptureFixture[str], base: list[str], tmp_path: Path) -> None:
    assert run_luve(capsys, "fit", *base, "--trainer.fast_dev_run", "true").code == 0
    assert not list((tmp_path / "run").glob("*.*"))


def hear_ctrl_c() -> None:
    """A shell ignores Ctrl-C on behalf of what it starts in the background, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.slow
def test_ctrl_c_exits_with_130(base: list[str], tmp_path: Path) -> None:
    words = ["fit", *base, "--trainer.max_steps", "100000000", "--trainer.max_epochs", "-1"]
    process = LuveProcess(tmp_path / "printed.txt", *words, prepare=hear_ctrl_c)
    metrics = tmp_path / "run" / "metrics.csv"
    assert wait_for(lambda: metrics.exists() or not process.alive())
    assert process.alive(), process.text()
    process.send(signal.SIGINT)
    assert process.finish(130).splitlines()[-1] == "luve fit: interrupted"


@pytest.mark.parametrize("verb", verbs())
def test_an_interrupted_verb_that_keeps_its_work_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("luve_lightning.__main__.run_verb", interrupt)
    outcome = run_luve(capsys, *verb.split(), "--anything", "1")
    assert outcome.code == 130
    keeps = verb in [
        "mini-world",
        "index",
        "precompute",
        "embed",
        "score",
        "generate",
        "upsample",
        "evaluate",
        "ingest",
        "ablate",
        "rehearse",
    ]
    hint = "; run the same command again to continue" if keeps else ""
    assert outcome.error_lines == [f"luve {verb}: interrupted{hint}"]
