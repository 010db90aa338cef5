"""What the program runs on: this machine, its processes, and what operations take on it."""

from __future__ import annotations

import ctypes
import json
import math
import multiprocessing
import os
import signal
import statistics
import subprocess
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")

PACKAGE_ROOT = Path(__file__).resolve().parents[1]
MANY_WORKERS = 16  # allowed anywhere; more than four per core only wait for each other
MEASURED = "measured.json"
"""In a training's folder: what its steps take, see UnitTimes."""
PROFILED = 2  # steps of callbacks.StepParts; the profiler itself starts during the first

_MIB = 2**20
_RECENT = 64  # units whose median is the pace
_EXACT = 8  # units at whose end the GPU is waited for; more would slow down training
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _KEPT = -1, -3, 2**30  # mallopt's; pieces up to a GiB are kept
_CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decoding_threads() -> int:
    """Threads that decode videos: one per core, at most 8, since more decode faster than anything measures."""
    return min(8, cores())


def gather_mappings(mapping: Mapping[K, V]) -> dict[K, V]:
    """The union of all processes' mappings, sorted by key; every process must call it.

    For results keyed by sample: means over the union are the same for any number of processes, even when shards
    are uneven or a sampler gave one sample to two of them (the highest rank's value is kept). Without a process
    group, the mapping itself.

    Args:
        mapping: this process's results, possibly empty; keys must be sortable, keys and values picklable.
    """
    import torch.distributed

    shards: list[Any] = [dict(mapping)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shards = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shards, dict(mapping))
    union = {key: value for shard in shards for key, value in shard.items()}
    return {key: union[key] for key in sorted(union)}


class RankError(RuntimeError):
    """An error on another rank; the text holds its traceback."""


def on_every_rank(rank: int, action: Callable[[], T]) -> T:
    """Run an action on every rank; when it fails on one, the run ends on all, and rank zero says why.

    An exception on one rank alone would leave the others waiting, and one on all of them would be told by each. The
    action must hold no collective operation that an error could keep a rank from. The forward pass of sharded weights
    (FSDP2) is one: there, only an error that all ranks have ends the run at once.

    Args:
        rank: this process's.
        action: what to run.

    Returns:
        The action's result on this rank.

    Raises:
        Exception: on rank zero, the action's own.
        RankError: on rank zero, when only another rank failed.
        SystemExit: on other ranks, with status 0: rank zero speaks for the run, and Lightning's launcher kills rank
            zero when a child reports a failure.
    """
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    # As text: not every exception can be pickled.
    text = "" if error is None else "".join(traceback.format_exception(error))
    failed = {rank: told for rank, told in gather_mappings({rank: text}).items() if told}
    if not failed:
        return result
    if rank != 0:
        raise SystemExit(0)
    if error is not None:
        raise error
    other, told = next(iter(failed.items()))
    raise RankError(f"rank {other} failed:\n{told}")


def choose_device(name: str) -> torch.device:
    """The device that an option names.

    Args:
        name: auto (a GPU if there is one), cpu, cuda or cuda:N.

    Raises:
        ValueError: another name, or a GPU that is not here.
    """
    import torch  # imported here: the rest of this module is used before PyTorch is loaded

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    # PyTorch also names devices it was built without, and `meta`, which computes nothing.
    if device.type not in ("cpu", "cuda") and not (device.type == "mps" and torch.backends.mps.is_available()):
        raise ValueError(f"device: no {name} here; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: no {name} here, PyTorch sees {torch.cuda.device_count()} GPUs")
    return device


def memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's when that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(_CGROUP_MEMORY.read_text()))
    except (OSError, ValueError):  # not in a container, or one without a limit ("max")
        return total


class UnitTimes:
    """How long a run's steps, clips or captions take, and the most memory on the GPU meanwhile.

    The first one tells what happens once: kernels that are compiled, buffers, processes that start. What comes
    between two counts towards the second, such as waiting for data. What the later ones' seconds were spent on is told
    by `spend`, part by part.

    Args:
        unit: What is counted: "step", "clip", "caption", "video".
        device: What computes; None before it is known.
    """

    def __init__(self, unit: str, device: torch.device | None = None) -> None:
        self.unit, self.device = unit, device
        self.done = 0
        self._born, self._since = time.perf_counter(), time.perf_counter()
        self._first: float | None = None
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._at, self._parts = self._since, dict[str, float]()
        self._peak: int | None = None

    def begin(self) -> None:
        """The next one begins now: what went on since the last, such as a validation, does not count."""
        self._since = self._at = time.perf_counter()

    def spend(self, part: str) -> None:
        """What went by since the last call, or since this one began, was spent on a part."""
        now = time.perf_counter()
        if self.done:
            self._parts[part] = self._parts.get(part, 0.0) + now - self._at
        self._at = now

    def advance(self, count: int = 1) -> None:
        """Count this many as done, together."""
        if self.done < _EXACT:
            self.note_memory(wait=True)
        now = time.perf_counter()
        if self._first is None:
            self._first = now - self._since
        else:
            self._recent.append((now - self._since) / count)
        self._since = now
        self.done += count

    def note_memory(self, wait: bool = False) -> None:
        """Note the most memory so far; `wait`: when the GPU has done what it was given."""
        if self.device is not None and self.device.type == "cuda":
            import torch

            if wait:
                torch.cuda.synchronize(self.device)
            self._peak = torch.cuda.max_memory_allocated(self.device)

    def record(self) -> dict[str, Any]:
        """What was measured, as plain values.

        Returns:
            `unit`, `done`, `seconds` since it was made, `first_seconds` of the first one and those done together with
            it, `seconds_per_unit` of the later ones (the median; None where there were none) and `peak_gib` that
            PyTorch allocated (None without a GPU). Where the later ones' parts are known, `parts` has them, and the
            `seconds` of all parts.
        """
        if self.done:
            self.note_memory()  # not at each: asking for it takes PyTorch a while
        parts = {"seconds": sum(self._parts.values()), **self._parts} if self._parts else {}
        told = {"parts": {part: round(seconds, 4) for part, seconds in parts.items()}} if parts else {}
        return {
            "unit": self.unit,
            "done": self.done,
            "seconds": round(time.perf_counter() - self._born, 3),
            "first_seconds": None if self._first is None else round(self._first, 4),
            "seconds_per_unit": round(statistics.median(self._recent), 4) if self._recent else None,
            "peak_gib": None if self._peak is None else round(self._peak / 2**30, 3),
            **told,
        }

    def write(self, path: Path | None, **facts: Any) -> None:
        """Write `record` and further facts as a JSON file, whole or not at all; nothing without a path.

        Raises:
            OSError: It cannot be written.
        """
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        unfinished.write_text(json.dumps({**self.record(), **facts}, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)


def visible_gpus() -> list[str]:
    """Names of the NVIDIA GPUs that a program would see, without loading PyTorch or touching one of them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    names = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return names if given is None else names[: len([one for one in given.split(",") if one.strip()])]


def check_workers(name: str, number: int, least: int = 0) -> None:
    """Refuse more processes or threads than this machine can use: starting them alone would take it down.

    Args:
        name: option, for the message.
        number: how many; up to four per core, and 16 anywhere.
        least: smallest allowed number.

    Raises:
        ValueError: fewer than `least`, or too many.
    """
    most = max(MANY_WORKERS, 4 * cores())
    if not least <= number <= most:
        raise ValueError(
            f"{name}: expected {least} to {most} on a machine of {cores()} core(s) (four per core, {MANY_WORKERS} "
            f"anywhere), got {number}"
        )


def check_memory(what: str, size: int, available: int | None = None) -> None:
    """Refuse what cannot fit into memory however the rest is arranged.

    Args:
        what: what is too large and which options reduce it, for the message.
        size: least number of bytes needed.
        available: bytes; default this machine's.

    Raises:
        ValueError: more is needed.
    """
    available = memory() if available is None else available
    if size > available:
        raise ValueError(
            f"{what} would take at least {size / 2**30:.3g} GiB of memory, there are {available / 2**30:.3g}"
        )


def check_video(frames: int, height: int, width: int) -> None:
    """Refuse a video whose pixels alone, as three float32 each, do not fit into memory; sizes are in pixels.

    Raises:
        ValueError: they do not fit.
    """
    check_memory(
        f"frames, height and width: the pixels of {frames} frames of {height}x{width}", frames * height * width * 3 * 4
    )


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
    import torch

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
    import torch

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


def end_with_parent() -> None:
    """In a process of a pool: leave Ctrl-C to the parent, and do not outlive it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def keep_freed_memory() -> None:
    """From now on, let the C library keep what is freed for what is allocated next; glibc only.

    For a process that makes large tensors again and again: usually they go back to the kernel, which then has to clear
    as many pages for the next ones.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            mallopt(parameter, _KEPT)
