"""`luve plan`: what generating a video takes, before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch

from luve_lightning.analysis.cost import gpu_speed
from luve_lightning.analysis.model_parts import PartConfigs, Parts
from luve_lightning.analysis.plan import Planner, plan_dict, plan_text
from luve_lightning.cascade.options import CascadeOptions
from luve_lightning.cascade.pipeline_files import expert_folders
from luve_lightning.cascade.speed import SpeedOptions
from luve_lightning.cli import Verb
from luve_lightning.models.backbones import load_backbone
from luve_lightning.models.experts import load_expert

VERBS = {"plan": Verb("Generation", "estimate what generating a video takes, before anything runs")}

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
