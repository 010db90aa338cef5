"""Signals end a run with everything saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from luve_lightning.callbacks import AtomicCheckpointIO, GracefulStop, StopRequested
from tests.helpers.processes import finish, run_processes, start
from tests.helpers.resumable import CropsDataModule, CropsTask, Run, SendSignal, train
from tests.helpers.waiting import wait_for

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def step_of(path: Path) -> int:
    return int(AtomicCheckpointIO().load_checkpoint(path)["global_step"])


class Ended(L.Callback):
    """Notes which of the hooks at a run's end were called."""

    def __init__(self) -> None:
        self.hooks: list[str] = []

    def on_train_epoch_end(self, *args: Any) -> None:
        self.hooks.append("epoch")

    def on_fit_end(self, *args: Any) -> None:
        self.hooks.append("fit")


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_saves_and_leaves_with_its_status(tmp_path: Path, number: signal.Signals) -> None:
    before = [signal.getsignal(s) for s in HANDLED]
    ended = Ended()
    run = Run(tmp_path, callbacks=(SendSignal(number.name, 2), ended))
    with pytest.raises(StopRequested) as stop:
        train(run)
    assert stop.value.code == 128 + number
    assert stop.value.told == (
        f"{number.name}: stopped after step 3, saved {run.last}; resume with --ckpt_path last"
    )
    assert step_of(run.last) == len(run.trained()) == 3
    assert ended.hooks == []  # no epoch end, no export
    assert [signal.getsignal(s) for s in HANDLED] == before


def test_a_run_that_ends_by_itself_gives_the_signals_back(tmp_path: Path) -> None:
    before = [signal.getsignal(s) for s in HANDLED]
    train(Run(tmp_path, steps=2))
    assert [signal.getsignal(s) for s in HANDLED] == before


def test_accumulated_gradients_are_used_first(tmp_path: Path) -> None:
    run = Run(tmp_path, accumulate=3, callbacks=(SendSignal("SIGTERM", 1),))
    with pytest.raises(StopRequested):
        train(run)
    assert (step_of(run.last), len(run.trained())) == (2, 6)


@pytest.mark.parametrize("every", [4, 100])
def test_a_validation_is_left_at_once(tmp_path: Path, every: int) -> None:
    run = Run(
        tmp_path,
        every_n_steps=every,
        trainer={"limit_val_batches": 4, "val_check_interval": 4},
        callbacks=(SendSignal("SIGTERM", 4, in_validation=True),),
    )
    with pytest.raises(StopRequested):
        train(run)
    assert step_of(run.last) == 4
    assert len(run.journal()) == 4  # four steps, no validation


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    run = Run(tmp_path, callbacks=(SendSignal("SIGINT", 2), SendSignal("SIGINT", 2)))
    assert run_processes(run) == [1]  # Lightning's status for an interrupt
    assert not run.last.exists()


def test_it_works_without_checkpoints_and_with_lightnings_own(tmp_path: Path) -> None:
    for name, callbacks in {"none": [], "own": [ModelCheckpoint(tmp_path / "own", save_top_k=0)]}.items():
        trainer = L.Trainer(
            default_root_dir=tmp_path / "none", max_steps=9, accelerator="cpu", logger=False, limit_val_batches=0,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            enable_checkpointing=bool(callbacks), plugins=AtomicCheckpointIO(),
            callbacks=[GracefulStop(["SIGTERM"]), SendSignal("SIGTERM", 3), *callbacks],
        )  # fmt: skip
        with pytest.raises(StopRequested):
            trainer.fit(CropsTask(), CropsDataModule())
        folder = tmp_path / "own" if name == "own" else tmp_path / "none" / "checkpoints"
        assert step_of(folder / "last.ckpt") == 4


@pytest.mark.parametrize("names", [["SIGTERM", "SIGFOO"], []])
def test_unknown_signals_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match="signals: expected names such as SIGTERM, got"):
        GracefulStop(names)


@pytest.mark.parametrize("rank", [0, 1, None])
def test_two_processes_agree_whoever_is_told(tmp_path: Path, rank: int | None) -> None:
    run = Run(tmp_path, processes=2, accumulate=2, callbacks=(SendSignal("SIGTERM", 3, rank),))
    assert run_processes(run) == [143, 0]
    assert step_of(run.last) == 4
    assert len(run.trained(0)) == len(run.trained(1))


@pytest.mark.slow
def test_two_processes_finish_a_validation_first(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        processes=2,
        trainer={"limit_val_batches": 1.0, "val_check_interval": 3},
        callbacks=(SendSignal("SIGTERM", 3, rank=1, in_validation=True),),
    )
    assert run_processes(run) == [143, 0]
    assert step_of(run.last) == 3
    assert [entry[0] for entry in run.journal()] == ["train"] * 3 + ["val"]


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loader_workers_outlive_a_signal_to_everybody(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=100_000, workers=2, every_n_steps=100_000)
    [process] = start(run)
    assert wait_for(lambda: len(run.trained()) > 5)
    assert process.pid is not None
    workers = children(process.pid)
    assert len(workers) == 2
    for pid in workers:  # first, so that a worker's death would be noticed before the stop
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    seen = len(run.trained())
    assert wait_for(lambda: len(run.trained()) > seen + 20), "it stopped at the workers' signal"
    os.kill(process.pid, signal.SIGTERM)
    assert finish([process]) == [143]
    assert step_of(run.last) == len(run.trained())
    assert wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers)), "workers are left"


@pytest.mark.slow
def test_the_command_with_lightnings_launcher(tmp_path: Path, repository: Path) -> None:
    run = Run(tmp_path)
    config = {
        "trainer": {
            "default_root_dir": str(tmp_path), "accelerator": "cpu", "devices": 2, "strategy": "ddp",
            "use_distributed_sampler": False, "max_steps": 1_000_000, "limit_val_batches": 0,
            "enable_progress_bar": False, "enable_model_summary": False,
            "plugins": [{"class_path": "luve_lightning.callbacks.AtomicCheckpointIO"}],
        },
        "model": {"class_path": "tests.helpers.resumable.CropsTask"},
        "data": {"class_path": "tests.helpers.resumable.CropsDataModule"},
        "callbacks": {
            "stop": {"class_path": "luve_lightning.callbacks.GracefulStop"},
            "checkpoints": {"class_path": "luve_lightning.callbacks.Checkpoints"},
            "ema": {"class_path": "luve_lightning.callbacks.EMA"},
            "random_state": {"class_path": "luve_lightning.callbacks.RandomState"},
            "nan_guard": {"class_path": "luve_lightning.callbacks.NaNGuard"},
            "journal": {"class_path": "tests.helpers.resumable.Journal", "init_args": {"folder": str(tmp_path)}},
        },
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "luve_lightning", "fit", "--config", str(tmp_path / "config.yaml")]
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(command, cwd=repository, stdout=output, stderr=subprocess.STDOUT)
        try:
            assert wait_for(lambda: len(run.trained(1)) > 5 or process.poll() is not None)
            process.send_signal(signal.SIGTERM)
            status = process.wait(150)
        finally:
            process.kill()
    text = (tmp_path / "output.txt").read_text()
    assert status == 143, text
    assert "Traceback" not in text
    assert text.splitlines()[-1] == (
        f"luve fit: SIGTERM: stopped after step {step_of(run.last)}, saved {run.last}; resume with --ckpt_path last"
    )
