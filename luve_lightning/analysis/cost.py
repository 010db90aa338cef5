"""What one operation costs: time, and additional memory."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

_MIB = 2**20

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """The cost of an operation.

    Attributes:
        ms: milliseconds; see `measure_ms`.
        peak_mib: memory in MiB; see `measure_peak_mib`.
    """

    ms: float
    peak_mib: float


def measure_ms(operation: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Run an operation once; its result, and milliseconds until the device has finished it (CUDA: by events)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        stream = torch.cuda.current_stream(device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        result = operation()
        end.record(stream)
        torch.cuda.synchronize(device)
        return result, begin.elapsed_time(end)
    start = time.perf_counter()
    result = operation()
    return result, (time.perf_counter() - start) * 1e3


def measure_peak_mib(operation: Callable[[], object], device: torch.device) -> float:
    """Run an operation once; the peak memory during it minus the memory before it, its result included.

    Exact on CUDA (PyTorch's allocator). On a CPU it is the growth of the process's resident memory, to about 1
    MiB: free heap is given back first (glibc), then Linux resets the high-water mark (`/proc/self/clear_refs`).
    NaN on other systems. Run the operation once before: what libraries set up on first use would count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        operation()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / _MIB
    before_rss = _reset_resident_peak()
    operation()
    return math.nan if before_rss is None else max(0, _resident_bytes("VmHWM") - before_rss) / _MIB


def _reset_resident_peak() -> int | None:
    """Reset the process's memory high-water mark; resident bytes now, or None where the kernel has none."""
    try:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _resident_bytes("VmRSS")
    except (OSError, LookupError, TypeError):  # TypeError: CDLL(None) on Windows
        return None


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise LookupError(field)
