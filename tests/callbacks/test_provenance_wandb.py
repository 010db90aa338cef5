"""What an offline wandb run holds is read back from its files: nothing here needs an account."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from luve_lightning.callbacks.provenance import copy_code
from tests.helpers.run_luve import run_luve
from tests.helpers.wandb_file import OfflineRun


def configuration(folder: Path, callbacks: str = "", wandb: str = "", monitor: str = "val_loss") -> Path:
    path = folder / "run.yaml"
    path.write_text(f"""
trainer:
  {{default_root_dir: {folder}/run, max_steps: 4, val_check_interval: 2, accelerator: cpu,
  enable_progress_bar: false, log_every_n_steps: 1}}
model: {{class_path: tests.helpers.tiny.TinyModule, init_args: {{lr: 0.25}}}}
data: {{class_path: tests.helpers.tiny.TinyData}}
callbacks:
  keep: {{class_path: luve_lightning.callbacks.Checkpoints, init_args: {{monitor: {monitor}, mode: min}}}}
  record: {{class_path: luve_lightning.callbacks.WandbRecord}}
{callbacks}
{wandb}
""")
    return path


def wandb_logger(folder: Path) -> str:
    return f"""
loggers:
  wandb:
    class_path: lightning.pytorch.loggers.WandbLogger
    init_args: {{project: p, save_dir: {folder}/run, offline: true, group: g, tags: [mini, one]}}
"""


@pytest.fixture(autouse=True)
def staging(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where offline artifacts wait, not at home."""
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    return tmp_path / "staging"


@pytest.mark.slow
def test_an_offline_run_holds_config_code_and_the_best_checkpoint(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, repository: Path
) -> None:
    config = configuration(tmp_path, wandb=wandb_logger(tmp_path))
    outcome = run_luve(capsys, "fit", "--config", config)
    assert outcome.code == 0, outcome.err
    run = OfflineRun(tmp_path / "run")
    assert (run.run.run_group, list(run.run.tags)) == ("g", ["mini", "one"])
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    for key in ("trainer", "model", "data", "callbacks", "seed_everything"):
        assert run.config[key] == written[key]
    assert run.config["verb"] == "fit"
    assert len(run.config["git"]["revision"]) == 40
    assert {"loss", "val_loss"} <= run.logged

    code = {entry.path: entry for entry in run.artifact("luve-lightning-code").manifest.contents}
    assert {"luve_lightning/tasks/vluer.py", "experiments/vluer/mini.yaml", "revision.txt"} <= set(code)
    staged = Path(code["luve_lightning/tasks/vluer.py"].local_path)
    assert staged.read_bytes() == (repository / "luve_lightning/tasks/vluer.py").read_bytes()

    artifact = run.artifact("TinyModule-checkpoint")
    [best] = (tmp_path / "run" / "checkpoints").glob("best-*.ckpt")
    [entry] = artifact.manifest.contents
    assert Path(entry.local_path).read_bytes() == best.read_bytes()
    facts = json.loads(artifact.metadata)
    assert "best" in artifact.aliases
    assert facts["monitor"] == "val_loss"
    assert f"step={facts['step']}" in best.name
    assert 0 < facts["score"] < 100
    assert facts["git"] == run.config["git"]


@pytest.mark.slow
def test_a_test_logs_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = configuration(tmp_path)
    assert run_luve(capsys, "fit", "--config", config).code == 0
    config = configuration(tmp_path, wandb=wandb_logger(tmp_path))
    assert run_luve(capsys, "test", "--config", config, "--ckpt_path", "last").code == 0
    run = OfflineRun(tmp_path / "run")
    assert run.config["verb"] == "test"
    assert [artifact.name for artifact in run.artifacts] == ["luve-lightning-code"]


def test_nothing_happens_without_wandb(capsys: pytest.CaptureFixture[str], tmp_path: Path, staging: Path) -> None:
    with_record = run_luve(capsys, "fit", "--config", configuration(tmp_path))
    assert with_record.code == 0
    assert not list(tmp_path.rglob("wandb"))
    assert not staging.exists()
    without = run_luve(capsys, "fit", "--config", configuration(tmp_path), "--callbacks.record", "null")
    kept = (f"{tmp_path}/run/checkpoints holds an earlier run",)
    said = [line for line in without.error_lines if not line.startswith(kept)]
    assert with_record.error_lines == said


def test_disabled_wandb_does_no_harm(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb = wandb_logger(tmp_path).replace("offline: true", "offline: false")
    outcome = run_luve(capsys, "fit", "--config", configuration(tmp_path, wandb=wandb))
    assert outcome.code == 0, outcome.err


@pytest.mark.slow
def test_the_export_is_an_artifact_of_its_own_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Written into the run's folder, as an expert is: the run's other files do not belong to it."""
    callbacks = f"""
  export:
    class_path: luve_lightning.callbacks.Export
    init_args: {{output: {tmp_path}/run, weights: best}}
"""
    config = configuration(tmp_path, callbacks, wandb_logger(tmp_path))
    config.write_text(config.read_text().replace("tiny.TinyModule", "tiny_export.ExportingModule"))
    outcome = run_luve(capsys, "fit", "--config", config)
    assert outcome.code == 0, outcome.err
    artifact = OfflineRun(tmp_path / "run").artifact("ExportingModule-export")
    assert [entry.path for entry in artifact.manifest.contents] == ["weights.pt"]
    facts = json.loads(artifact.metadata)
    [best] = (tmp_path / "run" / "checkpoints").glob("best-*.ckpt")
    assert (facts["weights"], facts["monitor"]) == ("best", "val_loss")
    assert f"step={facts['step']}" in best.name
    # Of a folder that holds an earlier export, what is written anew counts.
    assert "best" in artifact.aliases


def test_the_code_of_a_changed_checkout_has_a_patch(tmp_path: Path) -> None:
    from tests.helpers.git import git

    root, out = tmp_path / "checkout", tmp_path / "out"
    (root / "luve_lightning").mkdir(parents=True)
    (root / "luve_lightning" / "a.py").write_text("x = 1\n")
    (root / "secret.env").write_text("key\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    revision = {"revision": git(root, "rev-parse", "HEAD"), "dirty": True}
    (root / "luve_lightning" / "a.py").write_text("x = 2\n")
    copy_code(root, out, revision)
    assert (out / "luve_lightning" / "a.py").read_text() == "x = 2\n"
    assert "+x = 2" in (out / "diff.patch").read_text()
    assert (out / "revision.txt").read_text().startswith(revision["revision"])
    assert not (out / "secret.env").exists()
