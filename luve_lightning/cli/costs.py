"""`luve plan` and `luve bench`: what generating a video takes, estimated before anything runs, and measured."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any, Literal

import torch

from luve_lightning.analysis.cost import gpu_speed
from luve_lightning.analysis.model_parts import PartConfigs, Parts
from luve_lightning.analysis.plan import Planner, plan_dict, plan_text
from luve_lightning.cascade.options import CascadeOptions
from luve_lightning.cascade.pipeline_files import expert_folders
from luve_lightning.cascade.speed import SpeedOptions
from luve_lightning.cli import Verb
from luve_lightning.machine import choose_device
from luve_lightning.models.backbones import load_backbone
from luve_lightning.models.experts import load_expert

VERBS = {
    "plan": Verb("Generation", "estimate what generating a video takes, before anything runs"),
    "bench": Verb(
        "Measurement", "time the models and measure their memory", subjects="luve_lightning.analysis.benchmarks"
    ),
}

Dtype = Literal["float32", "bfloat16", "float16"]


def plan(
    backbone: str,
    options: CascadeOptions,
    vluer: Path | None = None,
    refiner: str | None = None,
    experts: Path | None = None,
    dtype: Dtype = "bfloat16",
    vae_dtype: Dtype = "float32",
    tile: tuple[int, int] | None = None,
    offload: bool = False,
    gpu: str | None = None,
    gpu_tflops: float | None = None,
    output: Path | None = None,
) -> None:
    """Says what a video of some size takes: latents, tokens, steps, FLOPs, peak memory and time of each stage.

    Only configuration files are read, no weights (except those of experts). The models' own code is traced without
    values, tensor by tensor. Memory is what PyTorch allocates for one video; the CUDA context, about half a GiB,
    and fragmentation come on top. Times are estimates.

    Args:
        backbone: Folder of a diffusers pipeline, or a hub id whose configuration files are available.
        options: How the video is made.
        vluer: Folder of a VLUer; default the base size with Wan2.1's latents.
        refiner: Backbone or folder of the third stage's own transformer; default the first stage's.
        experts: Folder of the experts' folders; default none.
        dtype: Dtype of the transformers' and the text encoder's weights.
        vae_dtype: Dtype of the VAE's and the VLUer's weights.
        tile: Height and width in latents of the tiles to decode; default whole frames.
        offload: Keep only the model that runs on the GPU.
        gpu: Estimate times for an h200; default the GPU of this machine, if any, whose speed is measured in a
            second.
        gpu_tflops: TFLOP/s that attention reaches on your GPU.
        output: Also write everything to this JSON file.
    """
    if tile is not None and min(tile) < 1:
        raise ValueError(f"tile: expected a height and a width of at least 1, got {list(tile)}")
    rules = load_backbone(backbone).size_rules()
    options = options.resolved(rules)
    rules.check_cascade(options.motion[1:], options.size[1:])
    speed = gpu_speed(gpu, gpu_tflops)
    configs = PartConfigs.from_pretrained(backbone, vluer, refiner, options.shift)
    parts = Parts(configs, getattr(torch, dtype), vae_dtype=getattr(torch, vae_dtype))
    for name, folder in expert_folders(experts).items():
        load_expert(parts.refiner, folder, name)
    stages = Planner(parts, options, SpeedOptions(decode_tile=tile, offload=offload), speed).stages()
    print(plan_text(stages, speed))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(plan_dict(options, stages, speed), indent=2) + "\n", encoding="utf-8")


def bench(
    subject: str, device: str = "cuda", repeats: int | None = None, output: Path | None = None, **options: Any
) -> None:
    """Measures time and peak memory, and prints one JSON line per row.

    Args:
        subject: What to measure.
        device: where to run, such as "cuda" or "cuda:1"; with "cpu", small models.
        repeats: timed runs after the warm-up; default from 20 of what takes milliseconds to 1 of what takes minutes.
        output: also append the rows to this file.
        options: the subject's own options.
    """
    if repeats is not None and repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    if device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"luve bench --device {device}: no CUDA device is visible here")
    target = choose_device(device)
    measure = importlib.import_module(f"{VERBS['bench'].subjects}.{subject.replace('-', '_')}").measure
    repeats = repeats or inspect.signature(measure).parameters["repeats"].default
    facts = {"torch": torch.__version__, "repeats": repeats}
    if target.type == "cuda":
        facts = {"gpu": torch.cuda.get_device_name(target)} | facts
    for row in measure(target, repeats, **options):
        line = json.dumps(row | facts)
        print(line, flush=True)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            with output.open("a") as file:
                file.write(line + "\n")
