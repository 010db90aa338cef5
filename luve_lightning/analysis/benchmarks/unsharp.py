"""`luve bench --subject unsharp`: unsharp masking of 4K frames, ours beside scikit-image on every core."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from luve_lightning.machine import end_with_parent

HEIGHT, WIDTH = 2160, 3840
RADII = (1.0, 2.0, 6.0)
FRAMES = 8  # frames of one clip; also what each core gets at once


def measure(device: torch.device, repeats: int = 20) -> list[dict[str, Any]]:
    """Time unsharp masking of 4K frames, ours beside scikit-image on every core.

    scikit-image runs one process per core, the fastest way to use it; its function itself uses one core.

    Args:
        device: device of our implementation.
        repeats: timed runs after one to warm up; the median counts.
    """
    cores = len(os.sched_getaffinity(0))
    where = str(device) if device.type != "cpu" else f"{torch.get_num_threads()} threads"
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        for radius in RADII:  # in turn, so that other processes disturb both
            run = partial(_on_every_core, pool, cores, radius)
            reference = _median_ms(run, repeats) / (cores * FRAMES)
            ms, peak = _ours(device, radius, repeats)
            rows.append(_row("scikit-image", f"{cores} cores", radius, reference))
            row = _row("ours", where, radius, ms) | {"times_faster": round(reference / ms, 1)}
            rows.append(row if peak is None else row | {"peak_mib_besides": peak})
    return rows


def _row(method: str, where: str, radius: float, ms: float) -> dict[str, Any]:
    return {
        "subject": "unsharp",
        "method": method,
        "on": where,
        "size": [HEIGHT, WIDTH],
        "radius": radius,
        "ms_a_frame": round(ms, 3),
    }


def _median_ms(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def _on_every_core(pool: ProcessPoolExecutor, cores: int, radius: float) -> None:
    for future in [pool.submit(_reference, radius) for _ in range(cores)]:
        future.result()


def _reference(radius: float) -> None:
    from skimage.filters import unsharp_mask

    frame = _reference_frame()
    for _ in range(FRAMES):
        # Not channel_axis=-1: scikit-image 0.26 then filters three rows and leaves the rest unset (its issue 7264).
        unsharp_mask(frame, radius=radius, amount=1.0, channel_axis=2)


@lru_cache(maxsize=1)  # made during warm-up, once per process
def _reference_frame() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).random((HEIGHT, WIDTH, 3), dtype=np.float32)


def _ours(device: torch.device, radius: float, repeats: int) -> tuple[float, float | None]:
    """Milliseconds per frame, and peak MiB beyond input and output."""
    from luve_lightning.functional.unsharp import unsharp_mask

    generator = torch.Generator(device).manual_seed(0)
    video = torch.rand(1, 3, FRAMES, HEIGHT, WIDTH, device=device, generator=generator) * 2 - 1

    def run() -> None:
        unsharp_mask(video, radius, 1.0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    if device.type != "cuda":
        return _median_ms(run, repeats) / FRAMES, None
    torch.cuda.reset_peak_memory_stats(device)
    ms = _median_ms(run, repeats) / FRAMES
    peak = torch.cuda.max_memory_allocated(device) - 2 * video.nbytes
    return ms, round(peak / 2**20, 1)
