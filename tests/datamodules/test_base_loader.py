"""Loader workers that outlive signals to the whole process group."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time

import pytest
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from luve_lightning.datamodules.base import OutlivingLoader


class Slow(Dataset[int]):
    """Numbers, each after a while."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        time.sleep(0.02)
        return index


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("starting", [True, False])
def test_workers_outlive_a_signal_from_their_first_moment(
    number: signal.Signals, starting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if starting:  # before the loader's own code in the worker has come to ours
        first = signal_handling._set_worker_signal_handlers

        def struck() -> None:
            first()
            os.kill(os.getpid(), number)

        monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", struck)
    batches = iter(OutlivingLoader(Slow(), batch_size=None, num_workers=2))
    found = [next(batches)]
    # Not from this process, which is their parent and may end them, but as from a job's time limit.
    child = os.fork()
    if child == 0:
        for worker in batches._workers:
            os.kill(worker.pid, number)
        os._exit(0)
    os.waitpid(child, 0)
    assert [*found, *batches] == list(range(6))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


class Hooked(Dataset[str]):
    """What a worker prints of an error in one of its threads."""

    errors = (ConnectionResetError("reset by peer"), EOFError(), ValueError("a bug"))

    def __len__(self) -> int:
        return len(self.errors)

    def __getitem__(self, index: int) -> str:
        error = self.errors[index]
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            sys.excepthook(type(error), error, None)
        return printed.getvalue()


def test_a_worker_does_not_print_that_the_run_hung_up() -> None:
    assert list(OutlivingLoader(Hooked(), batch_size=None, num_workers=1)) == ["", "", "ValueError: a bug\n"]


def test_it_is_a_data_loader_with_the_same_arguments() -> None:
    loader = OutlivingLoader(Slow(), batch_size=4)
    assert isinstance(loader, DataLoader)
    assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5]]
