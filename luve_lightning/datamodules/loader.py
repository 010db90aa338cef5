"""A DataLoader whose workers outlive the signals that end a run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from types import TracebackType
from typing import Any, TypeVar

from torch.utils.data import DataLoader

T = TypeVar("T", covariant=True)
_ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}


class OutlivingLoader(DataLoader[T]):
    """A DataLoader whose workers survive signals to the whole process group, from their first moment on.

    Ctrl-C, a job's time limit and `kill -- -GROUP` reach the workers as well as the process that trains or
    encodes, which still needs them to finish its step. A worker that dies takes the run down before it has saved.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Lightning makes new loaders with all arguments of the given one.
        super().__init__(*args, **{"worker_init_fn": _outlive_signals, **kwargs})

    def __iter__(self) -> Any:
        """Start the workers with the signals held back, which they inherit until they can handle them."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outlive_signals(worker: int) -> None:
    """In a worker: accept SIGTERM only from the parent, which is how the loader and the interpreter clean up."""
    del worker
    sys.excepthook = _print_unless_hung_up
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and hasattr(signal, "sigwaitinfo"):  # not on macOS
        threading.Thread(target=_end_at_parents_word, args=(parent.pid,), daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)


def _end_at_parents_word(parent: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(128 + signal.SIGTERM)


def _print_unless_hung_up(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """The hook of the thread that hands over a worker's tensors; a run that ends takes what it needs and hangs up."""
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
