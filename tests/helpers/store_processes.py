"""Several processes at one store, whatever it holds: one of them writes an entry, and a killed one leaves none."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.fork_server import start_process
from tests.helpers.store_size import StoreSize, store_size


@dataclass(frozen=True)
class Entries:
    """The entries of one kind of store.

    Attributes:
        key: key of an entry by its number.
        tensor: what is written as the entry of that number.
        stored: what is read again of it.
        reads: what is compared with that, of what the store reads.
    """

    key: Callable[[int], Any]
    tensor: Callable[[int], Tensor]
    stored: Callable[[Tensor], Tensor] = lambda tensor: tensor
    reads: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def are_in(self, store: Any, number: int) -> bool:
        """Whether the store gives the entry of that number."""
        return torch.equal(self.reads(store.read(self.key(number))), self.stored(self.tensor(number)))


def check_killed_writer(store: Any, entries: Entries, ready: Path) -> None:
    """A killed writer frees its claim and leaves no entry; what it and others left over is taken over or removed."""
    key, other = entries.key(0), entries.key(1)
    holder = start_process(_hold, type(store), store.root, key, ready)
    try:
        while not ready.exists():
            assert holder.is_alive()
            time.sleep(0.02)
        with store.claim(key) as mine:
            assert not mine
        assert store.clean() == 0, "a living writer's file must stay"
    finally:  # at its end the interpreter would wait for it
        holder.kill()
    holder.join()
    assert store_size(store.root) == StoreSize(0, 0, 1)
    assert not store.has(key)

    store.path(other).parent.mkdir(exist_ok=True)
    store.path(other).with_suffix(".tmp").write_bytes(b"left over")
    store.write(key, entries.tensor(0))  # takes the left-over file over
    assert entries.are_in(store, 0)
    assert store.clean() == 1
    assert store_size(store.root).unfinished == 0


def _hold(kind: type[Any], root: Path, key: Any, ready: Path) -> None:
    store = kind(root)
    with store.claim(key) as mine:
        assert mine
        store.path(key).with_suffix(".tmp").write_bytes(b"half an entry")
        ready.touch()
        time.sleep(600)


def check_race(store: Any, entries: Entries, processes: int, count: int = 60) -> None:
    """Processes that all want the same entries never write one twice, and those that wait for one find it."""
    context = multiprocessing.get_context("fork")
    start, won = context.Barrier(processes), context.Queue()
    running = [context.Process(target=_race, args=(store, entries, count, start, won)) for _ in range(processes)]
    for process in running:
        process.start()
    wins: list[int] = []
    while any(process.is_alive() for process in running) or not won.empty():
        while not won.empty():
            wins.append(won.get())
        time.sleep(0.01)
    assert [process.exitcode for process in running] == [0] * processes
    assert len(wins) == len(set(wins)) == store_size(store.root).entries
    # A cleaner can make a claim fail for a moment; the entries waited for are all there.
    assert set(range(0, count, 3)) <= set(wins)
    assert store_size(store.root).unfinished == 0
    assert all(entries.are_in(store, number) for number in wins)


def _race(here: Any, entries: Entries, count: int, start: Any, won: Any) -> None:
    store = type(here)(here.root)
    start.wait()
    for number in range(count):
        wait = number % 3 == 0
        with store.claim(entries.key(number), wait=wait) as mine:
            if mine:
                store.write(entries.key(number), entries.tensor(number))
                won.put(number)
            elif wait:
                assert entries.are_in(store, number)
        if number % 7 == 0:
            store.clean()
