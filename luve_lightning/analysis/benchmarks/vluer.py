"""`luve bench --subject vluer`: the base VLUer and the released one from 720p latents to 2K and 4K, beside bilinear."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from luve_lightning.functional.interpolation import interpolate_latents
from luve_lightning.machine import measure_ms
from luve_lightning.models.vluer import BaseVLUer, ReleasedVLUer, VLUer

# Latent grids of the paper at 49 frames: 720x1280 -> 1472x2560 (2K) and 2176x3840 (4K).
LOW = (13, 90, 160)
TARGETS = {"2K": (13, 184, 320), "4K": (13, 272, 480)}


def measure(device: torch.device, repeats: int = 20) -> Iterator[dict[str, Any]]:
    """Time the base VLUer, eager and compiled, and the released one from 720p latents to 2K and 4K, beside bilinear.

    The released one is timed in bfloat16 and in float32, as it was released; of the 90 rows it takes 88, as the
    original does. Weights are random.

    Args:
        device: a GPU.
        repeats: timed runs after three to warm up; the median counts.

    Raises:
        ValueError: another device.
    """
    require_gpu(device)
    torch.manual_seed(0)
    latents = torch.randn(1, 16, *LOW, device=device)
    net = VLUer()
    # The last convolution starts at zero; fast kernels must not be timed on zeros.
    torch.nn.init.normal_(net.decoder.conv_out.weight, std=0.02)
    yield from time_upsampler(net, latents.bfloat16(), repeats, compiled=True)
    del net
    released = ReleasedVLUer(crop=True)
    yield from time_upsampler(released, latents.bfloat16(), repeats)
    yield from time_upsampler(released, latents, repeats)


@torch.inference_mode()
def time_upsampler(
    net: BaseVLUer, latents: torch.Tensor, repeats: int, compiled: bool = False
) -> Iterator[dict[str, Any]]:
    """Rows of one model in the latents' dtype and, for the same latents, of bilinear interpolation."""
    device = latents.device
    model: Any = net.to(device, latents.dtype).eval()
    about = {
        "subject": "vluer",
        "model": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtype": str(latents.dtype).removeprefix("torch."),
    }
    for name, size in TARGETS.items():
        row = {**about, "target": name}
        yield row | {"method": "bilinear"} | time_on_gpu(partial(interpolate_latents, latents, size), device, repeats)
        yield row | {"method": "eager"} | time_on_gpu(partial(model, latents, size), device, repeats)
    if not compiled:
        return
    model.compile()
    for name, size in TARGETS.items():
        started = time.perf_counter()
        model(latents, size)
        torch.cuda.synchronize(device)
        compile_s = round(time.perf_counter() - started, 1)
        measured = time_on_gpu(partial(model, latents, size), device, repeats)
        yield {**about, "target": name, "method": "compiled", "compile_s": compile_s} | measured


def require_gpu(device: torch.device) -> None:
    """Refuse another device, of which figures would tell nothing.

    Raises:
        ValueError: it is not a GPU.
    """
    if device.type != "cuda":
        raise ValueError(f"device: expected a CUDA device, since figures are those of a GPU, got {device}")


def time_on_gpu(run: Callable[[], object], device: torch.device, repeats: int, warmup: int = 3) -> dict[str, float]:
    """Median, least and most milliseconds by CUDA events, and peak allocated memory, everything resident included."""
    for _ in range(warmup):
        run()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    times = [measure_ms(run, device)[1] for _ in range(repeats)]
    return {
        "ms": round(statistics.median(times), 3),
        "ms_min": round(min(times), 3),
        "ms_max": round(max(times), 3),
        "peak_mib": round(torch.cuda.max_memory_allocated(device) / 2**20, 1),
    }
