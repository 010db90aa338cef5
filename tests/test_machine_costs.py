"""Time and memory of an operation, against ones whose cost is known."""

from __future__ import annotations

import math
import sys
import time

import pytest
import torch

from luve_lightning import machine
from luve_lightning.machine import measure_ms, measure_peak_mib

CPU = torch.device("cpu")


def test_time_is_that_of_the_operation_and_its_result_comes_back() -> None:
    start = time.perf_counter()
    result, ms = measure_ms(lambda: time.sleep(0.05) or "done", CPU)
    assert result == "done"
    assert 50 <= ms <= (time.perf_counter() - start) * 1e3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux resets a process's memory peak")
def test_memory_is_the_peak_above_what_was_there() -> None:
    there = torch.ones(2**22)  # 16 MiB that must not count

    def operation() -> torch.Tensor:
        temporary = torch.ones(2**24) + 0  # 64 MiB, twice
        return temporary[:1] + there[:1]

    assert 60 <= measure_peak_mib(operation, CPU) <= 140
    assert measure_peak_mib(lambda: there[:4].clone(), CPU) < 8


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux resets a process's memory peak")
def test_memory_that_the_heap_kept_counts_again() -> None:
    # Blocks below glibc's mmap threshold come from the heap, which keeps what is freed.
    def operation() -> int:
        return len([torch.ones(2**12) for _ in range(2000)])  # 16 KiB each

    operation()
    assert 25 <= measure_peak_mib(operation, CPU) <= 60
    assert 25 <= measure_peak_mib(operation, CPU) <= 60


def test_memory_is_nan_where_it_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_reset_resident_peak", lambda: None)
    assert math.isnan(measure_peak_mib(lambda: None, CPU))
