"""Waiting for a file that somebody else is making. What the stores do with claims is tested with them."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from luve_lightning.data.store import ClaimedFiles
from tests.helpers.store_size import store_size

DIGEST = "0a" * 32


class Signalled(Exception):
    """Raised by a signal's handler, as StopPredictionOnSigterm's raises SystemExit."""


@pytest.fixture
def handled() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Signalled

    before = signal.signal(signal.SIGUSR1, stop)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("handled")
def test_a_signal_to_another_thread_ends_the_wait(tmp_path: Path) -> None:
    """Inside the system's call only a signal to this very thread, at no moment before it, would."""

    caught = threading.Event()

    def later() -> None:
        caught.wait(60)
        time.sleep(0.1)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    def wait() -> None:
        caught.set()
        with ClaimedFiles(tmp_path).claim(DIGEST, wait=True):
            pass

    with ClaimedFiles(tmp_path).claim(DIGEST) as mine:
        assert mine
        thread = threading.Thread(target=later)
        thread.start()
        with pytest.raises(Signalled):
            wait()
    thread.join()
    assert store_size(tmp_path).unfinished == 0


@pytest.mark.parametrize("written", [True, False])
def test_the_wait_ends_with_the_other_claim(tmp_path: Path, written: bool) -> None:
    claimed, waiting = threading.Event(), threading.Event()

    def make() -> None:
        files = ClaimedFiles(tmp_path)
        with files.claim(DIGEST) as mine:
            assert mine
            claimed.set()
            waiting.wait(60)
            time.sleep(0.1)
            if written:
                files.write(DIGEST, b"theirs")

    thread = threading.Thread(target=make)
    thread.start()
    claimed.wait(60)
    waiting.set()
    with ClaimedFiles(tmp_path).claim(DIGEST, wait=True) as mine:
        assert mine is not written
        assert ClaimedFiles(tmp_path).path(DIGEST).exists() is written
    thread.join()
    assert store_size(tmp_path).unfinished == 0
