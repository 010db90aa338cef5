"""`luve bench`: what the models cost at real sizes, with random weights."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from luve_lightning.analysis.bench_unsharp import bench_unsharp
from luve_lightning.cli import Verb
from luve_lightning.cli.environment import choose_device

VERBS = {
    "bench": Verb(
        "Measurement",
        "time the models and measure their memory",
    ),
}


Subject = Literal[
    "vluer", "vluer-train", "unsharp", "experts", "experts-train", "evaluate", "generate", "options"
]

# Latent grids of the paper at 49 frames: 720x1280 -> 1472x2560 (2K) and 2176x3840 (4K).
LOW = (13, 90, 160)
TARGETS = {"2K": (13, 184, 320), "4K": (13, 272, 480)}

# Of what takes milliseconds; the others take seconds or minutes a run.
REPEATS = 20
FEWER_REPEATS: dict[Subject, int] = {"experts-train": 1, "evaluate": 2, "generate": 3, "options": 1}


def bench(
    subject: Subject,
    device: str = "cuda",
    repeats: int | None = None,
    batch_size: int = 2,
    crop: int = 60,
    frames: int = 11,
    videos: int = 100,
    sizes: str = "720p,2k,4k",
    vae_dtype: Literal["float32", "bfloat16"] = "float32",
    backbone: str | None = None,
    refiner: str | None = None,
    video: tuple[int, int, int] | None = None,
    prompt: str = "",
    output: Path | None = None,
) -> None:
    """Measure time and peak memory, print one JSON line a row.

    Args:
        subject: "vluer": the base VLUer from 720p latents to 2K and 4K, bfloat16, eager and compiled, beside bilinear.
            "vluer-train": one optimiser step of experiments/vluer/wan2.1.yaml with a randomly initialised Wan2.1 VAE,
            phase 1 and phase 2. "unsharp": unsharp masking of 4K frames beside scikit-image; with --device cpu too.
            "experts": a forward pass of the transformer with and without each expert, Wan2.1-1.3B at 2K on a GPU, the
            mini backbone with --device cpu. "experts-train": one training step of the adaptation and of each expert
            beside the forward pass, sizes likewise. "evaluate": videos of 49 frames at 1080p through `luve evaluate`
            with a network that costs nothing, beside only decoding them; with --device cpu too. "generate": each stage
            of the cascade beside what `luve plan` says of it, Wan2.1-1.3B on a GPU (about 6 minutes for all sizes,
            most of them for 4k), small models with --device cpu. "options": the third stage by each option of speed and
            memory, likewise (about a minute each) or with the weights of `backbone`.
        device: where to run, such as "cuda" or "cuda:1".
        repeats: timed runs after the warm-up; the median counts. Default 20, but 3 of "generate", 2 of "evaluate", 1 of
            "experts-train" and "options", which take seconds or minutes each.
        batch_size: of the training step.
        crop: high-resolution latent height and width of the training step.
        frames: latent frames of the training step.
        videos: of "evaluate".
        sizes: of "generate": 720p (first stage), 2k and 4k (the others), separated by commas.
        vae_dtype: of the VAE and the VLUer of "generate".
        backbone: of "options", whose weights to take; default random ones.
        refiner: of "options", the third stage's transformer.
        video: of "options", frames, height and width in pixels; default 49 x 720 x 1280 on a GPU, 5 x 64 x 64 on a CPU.
        prompt: of "options", where a backbone is given.
        output: also append the rows to this file.
    """
    if repeats is None:
        repeats = FEWER_REPEATS.get(subject, REPEATS)
    if repeats < 1 or videos < 1:
        raise ValueError(f"expected repeats >= 1 and videos >= 1, got {repeats} and {videos}")
    if device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"luve bench --device {device}: no CUDA device is visible here")
    target = choose_device(device)
    device = str(target)
    if subject in ("vluer", "vluer-train") and target.type == "cpu":
        raise ValueError(
            f"luve bench --subject {subject} needs a CUDA device: its figures are those of a GPU"
        )
    rows: Iterable[dict[str, Any]]
    if subject == "unsharp":
        rows = bench_unsharp(device, repeats)
    elif subject == "experts":
        from luve_lightning.analysis.bench_experts import bench_experts

        rows = bench_experts(target, repeats)
    elif subject == "experts-train":
        from luve_lightning.analysis.bench_training import bench_training

        rows = bench_training(target, repeats)
    elif subject == "evaluate":
        from luve_lightning.analysis.bench_evaluate import bench_evaluate

        rows = bench_evaluate(target, repeats, videos)
    elif subject == "generate":
        from luve_lightning.analysis.bench_generate import bench_generate

        rows = bench_generate(target, repeats, sizes.split(","), getattr(torch, vae_dtype))
    elif subject == "options":
        from luve_lightning.analysis.bench_options import bench_options

        rows = bench_options(target, repeats, backbone, refiner, video, prompt)
    elif subject == "vluer":
        rows = _bench_vluer(target, repeats)
    else:
        rows = _bench_train(target, repeats, batch_size, crop, frames)
    facts = {"torch": torch.__version__, "repeats": repeats}
    if target.type == "cuda":
        facts = {"gpu": torch.cuda.get_device_name(target)} | facts
    for row in rows:
        line = json.dumps(row | facts)
        print(line, flush=True)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            with output.open("a") as file:
                file.write(line + "\n")


def _measure(
    run: Callable[[], object], device: torch.device, repeats: int, warmup: int = 3
) -> dict[str, float]:
    """Median, least and most milliseconds by CUDA events, and peak allocated memory, everything resident included."""
    for _ in range(warmup):
        run()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        times.append(begin.elapsed_time(end))
    return {
        "ms": round(statistics.median(times), 3),
        "ms_min": round(min(times), 3),
        "ms_max": round(max(times), 3),
        "peak_mib": round(torch.cuda.max_memory_allocated(device) / 2**20, 1),
    }


def _bench_vluer(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    from luve_lightning.functional.interpolation import interpolate_latents
    from luve_lightning.models.vluer import VLUer

    torch.manual_seed(0)
    net = VLUer().to(device, torch.bfloat16).eval()
    # The last convolution starts at zero; fast kernels must not be timed on zeros.
    torch.nn.init.normal_(net.decoder.conv_out.weight, std=0.02)
    latents = torch.randn(1, 16, *LOW, device=device, dtype=torch.bfloat16)
    rows = []
    with torch.inference_mode():
        for name, size in TARGETS.items():
            row = {
                "subject": "vluer",
                "target": name,
                "parameters": net.num_parameters(),
                "dtype": "bfloat16",
            }
            baseline = _measure(partial(interpolate_latents, latents, size), device, repeats)
            rows.append(row | {"method": "bilinear"} | baseline)
            rows.append(row | {"method": "eager"} | _measure(partial(net, latents, size), device, repeats))
        net.compile()
        for name, size in TARGETS.items():
            row = {
                "subject": "vluer",
                "target": name,
                "parameters": net.num_parameters(),
                "dtype": "bfloat16",
            }
            started = time.perf_counter()
            net(latents, size)
            torch.cuda.synchronize(device)
            compile_s = round(time.perf_counter() - started, 1)
            measured = _measure(partial(net, latents, size), device, repeats)
            rows.append(row | {"method": "compiled", "compile_s": compile_s} | measured)
    return rows


def _bench_train(
    device: torch.device, repeats: int, batch_size: int, crop: int, frames: int
) -> list[dict[str, Any]]:
    from diffusers import AutoencoderKLWan

    from luve_lightning.losses import FrameDifferenceL1, LatentL1, PixelL1
    from luve_lightning.models.vluer import VLUer
    from luve_lightning.tasks.vluer import VLUerTask

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoencoderKLWan().to(torch.bfloat16).save_pretrained(Path(folder) / "vae")
        task = VLUerTask(
            net=VLUer(),
            backbone=folder,
            losses={"latent": LatentL1(), "pixel": PixelL1(), "frame": FrameDifferenceL1()},
            codec_dtype="bfloat16",
        ).to(device)
    optimizer = torch.optim.AdamW(task.net.parameters(), lr=2e-4)
    low = torch.randn(batch_size, 16, frames, crop // 2, crop // 2, device=device)
    high = torch.randn(batch_size, 16, frames, crop, crop, device=device)

    def step(phase: int) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            prediction = task(low, (frames, crop, crop))
            loss = task.losses["latent"](prediction, high)
            if phase == 2:
                pixels = task.decoded_crops(prediction, high, step=0)
                loss = loss + task.losses["pixel"](*pixels) + task.losses["frame"](*pixels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    rows = []
    for phase in (1, 2):
        row = {
            "subject": "vluer-train",
            "phase": phase,
            "batch_size": batch_size,
            "crop": [frames, crop, crop],
        }
        rows.append(
            row | {"pixel_crop": list(task.pixel_crop)} | _measure(partial(step, phase), device, repeats)
        )
    return rows
