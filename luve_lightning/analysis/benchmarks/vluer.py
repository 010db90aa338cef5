"""`luve bench --subject vluer`: the base VLUer, the distilled and the released one from 720p latents to 2K and 4K."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from luve_lightning.analysis.dry_run import dry_run
from luve_lightning.functional.interpolation import interpolate_latents
from luve_lightning.machine import measure_ms
from luve_lightning.model_folders import read_config
from luve_lightning.models.vluer import BaseVLUer, ReleasedVLUer, VLUer, vluer_class

# Latent grids of the paper at 49 frames: 720x1280 -> 1472x2560 (2K) and 2176x3840 (4K).
LOW = (13, 90, 160)
TARGETS = {"2K": (13, 184, 320), "4K": (13, 272, 480)}
# The student of experiments/vluer/wan2.1-distilled.yaml.
DISTILLED = {"channels": 64, "pairs": 4, "hidden": 160, "query_channels": 48, "decoder_layers": 2}
_ROLES = ("base", "distilled", "released")


def measure(
    device: torch.device, repeats: int = 20, teacher: Path | None = None, distilled: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Count and time the base VLUer, the one distilled from it and the released one from 720p latents to 2K and 4K.

    Each network's operations are counted without values, on any machine. On a GPU they are then timed beside bilinear:
    the first two eager and compiled in bfloat16, the released one in bfloat16 and in float32, as it was released; of
    the 90 rows it takes 88, as the original does. Weights are random. Rows of the distilled one say how many times
    cheaper and faster than the first it is.

    Args:
        device: a GPU to time on; on a CPU nothing is timed.
        repeats: timed runs after three to warm up; the median counts.
        teacher: folder of a VLUer whose numbers to take instead of the base size.
        distilled: likewise, instead of those of experiments/vluer/wan2.1-distilled.yaml.
    """
    rows: list[dict[str, Any]] = []
    for role in _ROLES:
        with torch.device("meta"):
            net = _network(role, teacher, distilled)
        for row in count_upsampler(role, net):
            rows.append(row)
            yield row | _beside_base(row, rows, "tflop", "cheaper")
    if device.type != "cuda":
        return
    torch.manual_seed(0)
    rows.clear()
    for role in _ROLES:
        net = _network(role, teacher, distilled)
        latents = torch.randn(1, net.config.latent_channels, *LOW, device=device)
        if isinstance(net, VLUer):
            # The last convolution starts at zero; fast kernels must not be timed on zeros.
            torch.nn.init.normal_(net.decoder.conv_out.weight, std=0.02)
        for dtype in (torch.bfloat16, torch.float32) if role == "released" else (torch.bfloat16,):
            for row in time_upsampler(role, net, latents.to(dtype), repeats, compiled=role != "released"):
                rows.append(row)
                yield row | _beside_base(row, rows, "ms", "faster")


def _network(role: str, teacher: Path | None, distilled: Path | None) -> BaseVLUer:
    """A network with random weights."""
    if role == "released":
        return ReleasedVLUer(crop=True)
    folder = {"base": teacher, "distilled": distilled}[role]
    if folder is None:
        return VLUer(**(DISTILLED if role == "distilled" else {}))
    config = read_config(folder, "")
    net: BaseVLUer = vluer_class(config, folder).from_config(config)
    return net


def _about(role: str, net: Any) -> dict[str, Any]:
    return {"subject": "vluer", "model": type(net).__name__, "role": role, "parameters": net.num_parameters()}


def _beside_base(row: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], key: str, name: str) -> dict[str, float]:
    """How many times less than the base's row of the same target, method and dtype the distilled one's takes."""
    alike = {part: row.get(part) for part in ("target", "method", "dtype")} | {"role": "base"}
    found = [one for one in rows if {part: one.get(part) for part in alike} == alike]
    return (
        {name: round(found[0][key] / row[key], 2)} if row["role"] == "distilled" and row["method"] != "bilinear" else {}
    )


def count_upsampler(role: str, net: BaseVLUer) -> Iterator[dict[str, Any]]:
    """Rows of one model on the meta device: floating-point operations, a multiply-add counted as two."""
    for name, size in TARGETS.items():
        with dry_run() as run:
            net(torch.empty(1, net.config.latent_channels, *LOW, device="meta"), size)
        yield _about(role, net) | {"target": name, "method": "counted", "tflop": round(run.flops / 1e12, 4)}


@torch.inference_mode()
def time_upsampler(
    role: str, net: BaseVLUer, latents: torch.Tensor, repeats: int, compiled: bool = False
) -> Iterator[dict[str, Any]]:
    """Rows of one model in the latents' dtype and, for the same latents, of bilinear interpolation."""
    device = latents.device
    model: Any = net.to(device, latents.dtype).eval()
    about = _about(role, model) | {"dtype": str(latents.dtype).removeprefix("torch.")}
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
