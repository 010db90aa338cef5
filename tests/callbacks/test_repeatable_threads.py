"""Weights are the same whatever the machine's number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from luve_lightning.callbacks import CPUThreads
from luve_lightning.callbacks.repeatable import cpu_threads
from luve_lightning.models.vluer import VLUer
from luve_lightning.tasks.base import TrainingTask

STEPS = 6


class LatentTask(TrainingTask):
    """A VLUer, large enough for PyTorch to share its sums out over threads, on latents of noise."""

    def __init__(self, fail_at: int = -1) -> None:
        super().__init__(lr=1e-3, min_lr=1e-4, weight_decay=0.0, warmup_steps=1)
        torch.manual_seed(0)
        self.net = VLUer(channels=32, pairs=1, hidden=32, layers=1, query_channels=16, decoder_layers=1)
        self.fail_at, self.losses, self.threads = fail_at, list[float](), set[int]()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == self.fail_at:
            raise RuntimeError("as planned")
        low, high = batch[:, :, :, ::2, ::2], batch
        loss = (self.net(low, tuple(high.shape[2:])) - high).abs().mean()
        self.losses.append(loss.item())
        self.threads.add(torch.get_num_threads())
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        latents = torch.randn(4, 16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        return DataLoader(latents.repeat(STEPS, 1, 1, 1, 1), batch_size=4)  # type: ignore[arg-type]


def train(threads: int, *callbacks: L.Callback, task: LatentTask | None = None) -> LatentTask:
    """The task after a few steps on a machine whose number of threads is `threads`."""
    task = task or LatentTask()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with cpu_threads(threads):
        L.Trainer(
            accelerator="cpu", max_steps=STEPS, enable_checkpointing=False, callbacks=list(callbacks), **quiet
        ).fit(task)
        assert torch.get_num_threads() == threads, "a run leaves the number as it was"
    return task


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_a_fixed_number_gives_the_same_weights_on_any_machine() -> None:
    one, two, three = (train(threads, CPUThreads(2)) for threads in (1, 2, 3))
    assert one.threads == two.threads == three.threads == {2}
    assert one.losses == two.losses == three.losses
    for name, weight in one.net.state_dict().items():
        assert torch.equal(weight, two.net.state_dict()[name]), name
        assert torch.equal(weight, three.net.state_dict()[name]), name


def test_other_numbers_differ_by_rounding_only() -> None:
    one, two = train(1), train(2)
    assert (one.threads, two.threads) == ({1}, {2})
    assert one.losses == pytest.approx(two.losses, rel=1e-4)
    assert one.losses[-1] < one.losses[0], "it trained"


def test_a_run_that_fails_leaves_the_number_as_it_was() -> None:
    with pytest.raises(RuntimeError, match="as planned"), cpu_threads(1):
        train(1, CPUThreads(3), task=LatentTask(fail_at=2))


def test_no_thread_is_refused() -> None:
    with pytest.raises(ValueError, match="count: expected at least 1 thread, got 0"):
        CPUThreads(0)
    with pytest.raises(ValueError, match="threads: expected at least 1, got -1"), cpu_threads(-1):
        pass


def test_more_threads_than_can_be_started_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^count: expected 0 to \d+ on a machine of"):
        CPUThreads(10**5)
    with pytest.raises(ValueError, match=r"^threads: expected 0 to \d+ on a machine of"), cpu_threads(10**5):
        pass
