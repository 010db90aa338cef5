"""Signals end a run with everything saved."""

from __future__ import annotations

import json
import os
import signal
import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from luve_lightning.__main__ import main
from luve_lightning.callbacks import AtomicCheckpointIO, GracefulStop, StopRequested
from luve_lightning.callbacks.stops import StopPredictionOnSigterm
from luve_lightning.data.latent_store import LatentStore
from tests.helpers.luve_process import LuveProcess
from tests.helpers.precompute_run import PrecomputeRun, keys_of_last_clip, wait_for_entries
from tests.helpers.processes import finish, run_processes, start
from tests.helpers.resumable import CropsDataModule, CropsTask, Run, SendSignal, train
from tests.helpers.small_world import write_world
from tests.helpers.store_size import store_size
from tests.helpers.tiny import TinyModule
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
    assert stop.value.told == (f"{number.name}: stopped after step 3, saved {run.last}; resume with --ckpt_path last")
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


@pytest.mark.slow
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


@pytest.mark.parametrize(("processes", "agreed"), [(2, [3, 6]), (1, [1, 2, 3, 4, 5, 6, 7])])
def test_several_processes_agree_now_and_then(
    monkeypatch: pytest.MonkeyPatch, processes: int, agreed: list[int]
) -> None:
    stop, seen = GracefulStop(every_n_steps=3), []
    monkeypatch.setattr(stop, "_stop_if_asked", lambda trainer: seen.append(trainer.global_step))
    for step in range(1, 8):
        trainer: Any = SimpleNamespace(world_size=processes, global_step=step)
        stop.on_train_batch_end(trainer, TinyModule(), None, None, step)
    assert seen == agreed
    with pytest.raises(ValueError, match="every_n_steps: expected at least 1"):
        GracefulStop(every_n_steps=0)


@pytest.mark.slow
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


def called_by(words: list[str]) -> None:
    """Lightning's launcher starts the other process with the words of this one."""
    sys.argv = [str(Path(sys.executable).with_name("luve")), *words]


@pytest.mark.slow
def test_the_command_with_lightnings_launcher_writes_one_provenance_and_stops(tmp_path: Path, repository: Path) -> None:
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
    words = ["fit", "--config", str(tmp_path / "config.yaml")]
    process = LuveProcess(
        tmp_path / "output.txt", *words, environment={"PYTHONPATH": str(repository)}, prepare=partial(called_by, words)
    )
    try:
        assert wait_for(lambda: len(run.trained(1)) > 5 or not process.alive())
        process.send(signal.SIGTERM)
        text = process.finish(128 + signal.SIGTERM)
    finally:
        process.process.kill()
    assert "Traceback" not in text
    assert json.loads((tmp_path / "provenance.json").read_text())["processes"] == 2
    assert not (tmp_path / "provenance-2.json").exists()
    assert text.count("  model   CropsTask") == text.count("luve fit: SIGTERM: stopped") == 1
    assert text.splitlines()[-1] == (
        f"luve fit: SIGTERM: stopped after step {step_of(run.last)}, saved {run.last}; resume with --ckpt_path last"
    )


@pytest.mark.slow
def test_sigterm_ends_a_prediction_with_its_code_and_leaves_nothing_half_done(
    tmp_path: Path, tiny_backbone: Path
) -> None:
    world, store = write_world(tmp_path, 2), LatentStore(tmp_path / "store")
    with ExitStack() as claims:
        for key in keys_of_last_clip(tiny_backbone, world):
            assert claims.enter_context(store.claim(key))
        run = PrecomputeRun(tmp_path, tiny_backbone, world, store.root)
        wait_for_entries(store, 4, run)
        run.send(signal.SIGTERM)
        run.finish(128 + signal.SIGTERM)
    assert store_size(store.root).unfinished == 0
    assert "Traceback" not in run.text()


class Finalised:
    """Its end is when the signal comes."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def end_one_with_a_method() -> None:
    Finalised()


def end_one_that_is_watched() -> None:
    watched = Numbers()
    watch = weakref.ref(watched, lambda _: signal.raise_signal(signal.SIGTERM))
    del watched
    assert watch() is None


class Numbers(L.LightningModule):
    """Predicts and measures nothing; the signal comes in the second batch."""

    def __init__(self, end: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.end = end
        self.seen: list[int] = []

    def predict_step(self, batch: int, batch_idx: int) -> None:
        self.seen.append(batch_idx)
        if batch_idx == 1 and self.end is not None:
            self.end()

    def test_step(self, batch: int, batch_idx: int) -> None:
        self.predict_step(batch, batch_idx)

    def validation_step(self, batch: int, batch_idx: int) -> None:
        self.predict_step(batch, batch_idx)


@pytest.mark.parametrize("end", [end_one_with_a_method, end_one_that_is_watched])
def test_a_signal_while_something_is_finalised_ends_it_at_the_next_batch(
    end: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, task = signal.getsignal(signal.SIGTERM), Numbers(end)
    dropped: list[object] = []
    hook = dropped.append
    monkeypatch.setattr(sys, "unraisablehook", hook)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
        callbacks=[StopPredictionOnSigterm()],
    )  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        trainer.predict(task, list(range(5)))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert task.seen == [0, 1]
    assert dropped == []  # Python drops it in a callback of a weak reference, where no frame tells, and would print it
    assert sys.unraisablehook is hook
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("verb", ["predict", "test", "validate"])
def test_every_verb_ends_with_the_signals_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    """Through the command line: without a status of its own, a stopped measurement would look like a whole one."""
    before, seen = signal.getsignal(signal.SIGTERM), []

    def step(self: object, batch: object, batch_idx: int) -> None:
        seen.append(batch_idx)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(TinyModule, f"{'validation' if verb == 'validate' else verb}_step", step)
    (tmp_path / "run.yaml").write_text(f"""
trainer: {{default_root_dir: {tmp_path}, accelerator: cpu, enable_progress_bar: false}}
model: {{class_path: tests.helpers.tiny.TinyModule}}
data: {{class_path: tests.helpers.tiny.TinyData}}
""")
    assert main([verb, "--config", str(tmp_path / "run.yaml")]) == 143
    assert seen == [0]
    assert signal.getsignal(signal.SIGTERM) is before


def test_fit_without_a_graceful_stop_does_not_look_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TinyModule, "on_train_batch_end", lambda *_: signal.raise_signal(signal.SIGTERM), raising=False)
    (tmp_path / "run.yaml").write_text(f"""
trainer:
  {{default_root_dir: {tmp_path}, accelerator: cpu, enable_progress_bar: false, max_steps: 5,
  enable_checkpointing: false}}
model: {{class_path: tests.helpers.tiny.TinyModule}}
data: {{class_path: tests.helpers.tiny.TinyData}}
""")
    assert main(["fit", "--config", str(tmp_path / "run.yaml")]) == 143
