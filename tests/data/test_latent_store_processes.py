"""The latent store and several processes: one writes an entry, and a killed one leaves none."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from luve_lightning.data.latent_store import LatentKey, LatentStore
from tests.helpers.store_size import StoreSize, store_size

KEY = LatentKey(clip="a" * 64, vae="b" * 64, size=(192, 128), frames=(3, 12))


def latents(seed: int = 0, shape: tuple[int, ...] = (16, 3, 6, 5)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def store(tmp_path: Path) -> LatentStore:
    return LatentStore(tmp_path / "store")


HOLDER = """
import sys, time
from pathlib import Path
from luve_lightning.data.latent_store import LatentKey
from luve_lightning.data.latent_store import LatentStore
store = LatentStore(sys.argv[1])
key = LatentKey(clip="a" * 64, vae="b" * 64, size=(192, 128), frames=(3, 12))
with store.claim(key) as mine:
    assert mine
    store.path(key).with_suffix(".tmp").write_bytes(b"half an entry")
    Path(sys.argv[2]).touch()
    time.sleep(600)
"""


@pytest.mark.slow
def test_killed_writer_frees_its_claim_and_leaves_no_entry(store: LatentStore, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, store.root, ready])
    while not ready.exists():
        assert holder.poll() is None
        time.sleep(0.02)
    with store.claim(KEY) as mine:
        assert not mine
    assert store.clean() == 0, "a living writer's file must stay"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert store_size(store.root) == StoreSize(0, 0, 1)
    assert not store.has(KEY)

    other = replace(KEY, stride=2)
    store.path(other).parent.mkdir(exist_ok=True)
    store.path(other).with_suffix(".tmp").write_bytes(b"left over")
    store.write(KEY, latents())  # takes the left-over file over
    assert torch.equal(store.read(KEY), latents().half())
    assert store.clean() == 1
    assert store_size(store.root).unfinished == 0


def _race(root: Path, count: int, start: object, won: object) -> None:
    store = LatentStore(root)
    start.wait()  # type: ignore[attr-defined]
    for n in range(1, count + 1):
        key = replace(KEY, stride=n)
        wait = n % 3 == 0
        with store.claim(key, wait=wait) as mine:
            if mine:
                store.write(key, latents(n))
                won.put(n)  # type: ignore[attr-defined]
            elif wait:
                assert torch.equal(store.read(key), latents(n).half())
        if n % 7 == 0:
            store.clean()


def test_processes_never_write_one_entry_twice(store: LatentStore) -> None:
    count, processes = 60, 4
    context = multiprocessing.get_context("fork")
    start, won = context.Barrier(processes), context.Queue()
    running = [context.Process(target=_race, args=(store.root, count, start, won)) for _ in range(processes)]
    for process in running:
        process.start()
    wins = []
    while any(process.is_alive() for process in running) or not won.empty():
        while not won.empty():
            wins.append(won.get())
        time.sleep(0.01)
    assert [process.exitcode for process in running] == [0] * processes
    assert len(wins) == len(set(wins)) == store_size(store.root).entries
    # A cleaner can make a claim fail for a moment; the entries waited for are all there.
    assert set(range(3, count + 1, 3)) <= set(wins)
    assert store_size(store.root).unfinished == 0
    for n in wins:
        assert torch.equal(store.read(replace(KEY, stride=n)), latents(n).half())
