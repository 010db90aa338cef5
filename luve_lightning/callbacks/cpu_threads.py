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
        count: at least 1; may exceed the number of cores, up to four per core or 16.

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
    """Computes with a fixed number of CPU threads, whatever the machine's cores and OMP_NUM_THREADS.

    A sum split over a different number of threads rounds differently in the last digit, and training amplifies
    that: after 60 steps of the mini world's VLUer the weights of one and of two threads differ by 2e-6, and each
    step adds to it. With a fixed number a run gives the same weights on one core as on many of the same kind, idle
    or busy.

    Args:
        count: threads per process, at least 1. They share the available cores; up to four per core or 16.
    """

    def __init__(self, count: int = 2) -> None:
        if count < 1:
            raise ValueError(f"count: expected at least 1 thread, got {count}")
        check_workers("count", count)
        self.count = count
        self._before: int | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Set the number; here because Lightning sets its own when it launches processes."""
        if self._before is None:
            self._before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the former number."""
        self._restore()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Restore the former number; Lightning calls no teardown then."""
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            torch.set_num_threads(self._before)
            self._before = None
