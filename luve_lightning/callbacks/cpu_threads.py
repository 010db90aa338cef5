"""A fixed number of CPU threads, so that results do not depend on the machine's cores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import torch

from luve_lightning.machine import check_workers


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """PyTorch computes with this many CPU threads inside the context.

    Args:
        count: at least 1; more than there are cores is allowed, up to four a core or 16.

    Raises:
        ValueError: for less than one thread, or too many to start.
    """
    if count < 1:
        raise ValueError(f"threads: expected at least 1, got {count}")
    check_workers("threads", count)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class CPUThreads(L.Callback):
    """Computes with a fixed number of CPU threads, whatever the machine has and OMP_NUM_THREADS says.

    A sum that is split over other threads rounds otherwise in the last digit, and training makes that grow: after 60
    steps of the mini world's VLUer the weights of one and of two threads differ by 2e-6, and each step adds to it. With
    a fixed number a run gives the same weights on one core as on many of the same kind, idle or busy.

    Args:
        count: threads of each process, at least 1. They share what cores there are; up to four a core or 16.
    """

    def __init__(self, count: int = 2) -> None:
        if count < 1:
            raise ValueError(f"count: expected at least 1 thread, got {count}")
        check_workers("count", count)
        self.count = count
        self._before: int | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Set the number; here, since Lightning sets one of its own when it launches processes."""
        if self._before is None:
            self._before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Set what it was before."""
        self._restore()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Set what it was before; Lightning calls no teardown then."""
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            torch.set_num_threads(self._before)
            self._before = None
