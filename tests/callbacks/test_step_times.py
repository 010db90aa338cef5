"""What steps and clips take, as a run writes it down, and where that time goes on each process."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from luve_lightning.callbacks import StepParts
from luve_lightning.callbacks.step_times import ClipTimes, StepTimes, collectives, exposed, waits
from luve_lightning.machine import UnitTimes
from tests.helpers.processes import run_processes
from tests.helpers.resumable import Crops, CropsDataModule, Run, train
from tests.helpers.tiny import TinyData, TinyModule
from tests.helpers.waiting import wait_for

PARTS = ("data", "compute", "communication", "waiting", "optimizer")


def run(folder: Path, callbacks: Sequence[L.Callback], ckpt: Any = None, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {"max_steps": 6, "accelerator": "cpu", "logger": False, "limit_val_batches": 0}
    defaults |= {"enable_model_summary": False, "enable_progress_bar": False}
    trainer = L.Trainer(**(defaults | options), callbacks=list(callbacks), default_root_dir=folder)
    trainer.fit(TinyModule(), datamodule=TinyData(), ckpt_path=ckpt)
    return trainer


def test_what_steps_take_is_recorded_after_the_first_and_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    seen: list[dict[str, Any]] = []

    class Looks(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if path.exists():
                seen.append(json.loads(path.read_text()))

    first = run(tmp_path, callbacks=[StepTimes(), Looks()], max_steps=4)
    assert [one["step"] for one in seen] == [1, 1, 1]
    found = json.loads(path.read_text())
    assert (found["began"], found["step"], found["done"], found["processes"]) == (0, 4, 4, 1)
    assert found["first_seconds"] > 0
    assert found["seconds_per_unit"] > 0
    first.save_checkpoint(tmp_path / "a.ckpt")
    run(tmp_path, callbacks=[StepTimes()], max_steps=6, ckpt=tmp_path / "a.ckpt")
    found = json.loads(path.read_text())
    assert (found["began"], found["step"], found["done"]) == (4, 6, 2)


class Fails(L.Callback):
    """Ends a run in its second step."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 2:
            raise RuntimeError("here")


def test_micro_batches_are_no_steps_and_a_failing_run_is_recorded(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="here"):
        run(tmp_path, callbacks=[StepTimes(), Fails()], accumulate_grad_batches=2)
    found = json.loads((tmp_path / "measured.json").read_text())
    assert (found["step"], found["done"]) == (2, 2)


def test_the_steps_that_are_profiled_do_not_count_and_their_parts_are_written(tmp_path: Path) -> None:
    run(tmp_path, [StepParts(3), StepTimes()], max_steps=5)
    found = json.loads((tmp_path / "measured.json").read_text())
    assert (found["step"], found["done"]) == (5, 3)
    [own] = found["parts"].pop("ranks")
    assert sum(found["parts"][name] for name in PARTS) == pytest.approx(found["parts"]["seconds"], abs=1e-4)
    assert own == {**found["parts"], "hidden": 0.0}
    assert min(found["parts"][name] for name in ("seconds", "data", "compute", "optimizer")) > 0
    assert found["parts"]["communication"] == found["parts"]["waiting"] == 0


def test_micro_batches_belong_to_one_step_and_a_run_may_end_before_it_is_profiled(tmp_path: Path) -> None:
    class Reads(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            time.sleep(0.02)  # after StepParts has noted the end: as if the next batch took so long

    parts = StepParts(1)
    run(tmp_path, [parts, Reads()], max_steps=3, accumulate_grad_batches=2)
    assert parts.found["data"] >= 0.04, "both micro-batches of the step waited"
    early = StepParts(4)
    run(tmp_path, [early, StepTimes()], max_steps=5)
    assert early.found == {}
    assert json.loads((tmp_path / "measured.json").read_text())["done"] == 4
    with pytest.raises(RuntimeError, match="here"):
        run(tmp_path, [StepParts(1), Fails()])
    assert not torch.autograd._profiler_enabled(), "neither in a run that fails meanwhile"
    with pytest.raises(ValueError, match="after: expected at least 1 step, got 0"):
        StepParts(0)


def trace(*events: tuple[str, str, float, float]) -> dict[str, Any]:
    """Kind, name, beginning and duration in milliseconds; it began at second 5."""
    told = [{"ph": "X", "cat": cat, "name": name, "ts": ts * 1e3, "dur": dur * 1e3} for cat, name, ts, dur in events]
    return {"baseTimeNanoseconds": 5 * 10**9, "traceEvents": [*told, {"ph": "M", "name": "process_name"}]}


REDUCE, GATHER = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgs)", "ncclDevKernel_AllGather_RING_LL"


def test_communication_counts_where_nothing_is_computed_beside_it() -> None:
    found = exposed(
        trace(
            ("kernel", "gemm", 0, 400),
            ("kernel", REDUCE, 300, 400),
            ("kernel", GATHER, 650, 100),
            ("gpu_memcpy", "Memcpy DtoD", 700, 20),
            ("cuda_runtime", "cudaLaunchKernel", 420, 100),
            ("gpu_user_annotation", "nccl:all_reduce", 0, 900),
            ("kernel", REDUCE, 900, 50),
        ),
        {"all": [(5.0, 6.0)], "data": [(5.0, 5.1), (5.35, 5.5)], "optimizer": [(5.94, 6.0)]},
    )
    assert found["all"] == pytest.approx(0.3 + 0.05 - 0.02 + 0.05)
    assert found["hidden"] == pytest.approx(0.1 + 0.02)
    assert found["data"] == pytest.approx(0.1)
    assert found["optimizer"] == pytest.approx(0.01)
    assert found["computed"] == 2


def test_a_process_waits_for_the_one_that_comes_last_to_each_collective() -> None:
    """Two of one kind, and one whose second has not all begun by the end of another's; one that is not of all."""
    ranks = [
        collectives(trace(("kernel", REDUCE, 500, 200), ("kernel", REDUCE, 0, 300), ("kernel", GATHER, 800, 20))),
        collectives(trace(("kernel", REDUCE, 100, 200), ("kernel", REDUCE, 450, 250))),
        collectives(trace(("kernel", REDUCE, 200, 100), ("kernel", REDUCE, 600, 100))),
    ]
    among = dict(enumerate(ranks))
    for rank, expected in enumerate(([(0.0, 0.2), (0.5, 0.6)], [(0.1, 0.2), (0.45, 0.6)], [])):
        found = [(start - 5, stop - 5) for start, stop in waits(rank, among)]
        assert found == [pytest.approx(one) for one in expected]


SLOW, PROFILED_STEP = 1.0, 2  # seconds; and the step of three whose parts are told


class SlowCrops(Crops):
    """In the step that is watched, reading goes on for long after the other process has its batch."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.read = folder, 0

    def __getitem__(self, key: Any) -> dict[str, Any]:
        if self.read == 2 * PROFILED_STEP:
            assert wait_for((self.folder / "batch-1").exists)
            time.sleep(SLOW)
        self.read += 1
        return super().__getitem__(key)


class Sleeps(L.Callback):
    """In that step, the second process's forward pass goes on for long after the first's is done.

    Before it, the second process's profiler takes as long to start.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_rank == 1:
            strategy, barrier = trainer.strategy, trainer.strategy.barrier
            strategy.barrier = lambda *names: (time.sleep(SLOW), barrier(*names))  # type: ignore[method-assign]

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == PROFILED_STEP:
            (self.folder / f"batch-{trainer.global_rank}").touch()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Any) -> None:
        if trainer.global_step == PROFILED_STEP:
            (self.folder / f"forward-{trainer.global_rank}").touch()
            if trainer.global_rank == 1:
                assert wait_for((self.folder / "forward-0").exists)
                time.sleep(SLOW)


def train_unevenly(run: Run) -> None:
    """The first process reads slowly, the second computes slowly."""
    data = CropsDataModule()
    crops = Crops() if os.environ["LOCAL_RANK"] == "1" else SlowCrops(run.folder)
    data.setup = lambda stage: setattr(data, "items", crops)
    train(run, data=data)


@pytest.mark.slow
def test_a_slow_process_and_slow_reading_are_told_apart(tmp_path: Path) -> None:
    """Each sleeps when the other has only a few operations to go until it waits, which takes less than half of it."""
    sent = Run(tmp_path, steps=3, processes=2, callbacks=(StepParts(1), Sleeps(tmp_path), StepTimes()))
    assert run_processes(sent, train_unevenly) == [0, 0], (tmp_path / "output-0.txt").read_text()
    found = json.loads((tmp_path / "measured.json").read_text())["parts"]
    first, second = found["ranks"]
    assert first["data"] >= SLOW
    assert second["compute"] >= SLOW
    assert first["waiting"] > SLOW / 2, "for the second, in all-reduce"
    assert second["waiting"] > SLOW / 2, "for the first's batch, before the forward pass"
    for one in (first, second, found):
        assert sum(one[name] for name in PARTS) == pytest.approx(one["seconds"], abs=1e-4)
        assert min(one[name] for name in PARTS) >= 0, "what a process waited before the step is none of its parts"


class Encodes(L.LightningModule):
    """Makes an item of each row; what it does takes its time."""

    seconds_written = 0.0

    def predict_step(self, batch: list[Any], batch_idx: int) -> int:
        time.sleep(0.03)
        if batch_idx == 2:  # else there is nothing to store
            time.sleep(0.05)
            self.seconds_written += 0.05
        return 0 if batch_idx == 0 else len(batch)


def test_what_clips_take_is_told_by_what_they_wait_for(tmp_path: Path) -> None:
    times = ClipTimes(UnitTimes("clip"))
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=[times], **options)
    trainer.predict(Encodes(), TinyData(), return_predictions=False)
    [own] = times.found["parts"].pop("ranks")
    assert own["items"] == times.times.done == 3, "the first batch gave nothing new"
    assert own["encoding"] >= 0.06, "of the two after the first that did"
    assert own["writing"] == pytest.approx(0.05)
    parts = times.found["parts"]
    assert sum(parts[name] for name in ("reading", "encoding", "writing", "waiting")) == pytest.approx(
        parts["seconds"], abs=1e-3
    )
    assert times.found["rate"] == pytest.approx(1 / own["seconds_per_unit"])
