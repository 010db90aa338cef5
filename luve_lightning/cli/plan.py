"""`luve plan`: what generating a video takes, before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch

from luve_lightning.analysis.gpu_speed import gpu_speed
from luve_lightning.analysis.model_parts import PartConfigs, Parts
from luve_lightning.analysis.plan import Planner, plan_dict, plan_text
from luve_lightning.analysis.stage_programs import VideoPlan
from luve_lightning.cascade.denoise import Guidance
from luve_lightning.cascade.luve_components import expert_folders
from luve_lightning.cascade.video_sizes import SizeRules
from luve_lightning.cli import Verb
from luve_lightning.models.experts import load_expert

VERBS = {
    "plan": Verb(
        "Generation",
        "say what generating a video takes, before anything runs",
    ),
}


_GUIDANCE = Guidance()
Dtype = Literal["float32", "bfloat16", "float16"]


def plan(
    backbone: str,
    height: int,
    width: int,
    num_frames: int = 49,
    motion_height: int | None = None,
    motion_width: int | None = None,
    scale: float = 2.0,
    cascade: bool = True,
    steps: int = 50,
    skip_steps: int = 5,
    guidance: Guidance = _GUIDANCE,
    refine_guidance: Guidance | None = None,
    shift: float | None = None,
    vluer: Path | None = None,
    refiner: str | None = None,
    experts: Path | None = None,
    upsampling: Literal["vluer", "latent", "rgb"] = "vluer",
    dtype: Dtype = "bfloat16",
    vae_dtype: Dtype = "float32",
    tile: tuple[int, int] | None = None,
    offload: bool = False,
    gpu: str | None = None,
    gpu_tflops: float | None = None,
    output: Path | None = None,
) -> None:
    """Says what a video of some size takes: latents, tokens, steps, FLOPs, peak memory and time of each stage.

    Only configuration files are read, no weights (but those of experts). The models' own code is
    followed without values, tensor by tensor. Memory is what PyTorch allocates for one video; the CUDA context, about
    half a GiB, and fragments come on top. Times are estimates.

    Args:
        backbone: Folder of a diffusers pipeline, or a hub id whose configuration files can be had.
        height: Of the video, in pixels.
        width: Of the video, in pixels.
        num_frames: Of the video, 4k+1.
        motion_height: Of the first stage, in pixels; default the height over the scale, rounded to what is possible.
        motion_width: Of the first stage; default likewise.
        scale: How many times smaller the first stage is, where its size is not given.
        cascade: False plans one stage at full size.
        steps: Of the schedule.
        skip_steps: How many of them refinement leaves out (the paper's S is 5, its released checkpoints take 10).
        guidance: Classifier-free guidance: scale (1 is none), the interval of sigma, batched or not.
        refine_guidance: Of the third stage; default as the first's.
        shift: Of the schedule; default the backbone's.
        vluer: Folder of a VLUer; default the base size with Wan2.1's latents.
        refiner: Backbone or folder of the third stage's own transformer; default the first stage's serves both.
        experts: Folder of the experts' folders; default none.
        upsampling: Second stage: vluer, latent (interpolated) or rgb (decoded, interpolated, encoded).
        dtype: Of the transformers' and the text encoder's weights.
        vae_dtype: Of the VAE's and the VLUer's.
        tile: Height and width in latents of the tiles that are decoded at a time; default whole frames.
        offload: Keep only the model that runs on the GPU.
        gpu: Estimate times for an h200; default the GPU that is here, if any, whose speed is measured in a second.
        gpu_tflops: TFLOP/s that attention reaches on your GPU.
        output: Also write everything to this JSON file.
    """
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale: expected a number > 0, got {scale}")
    if tile is not None and min(tile) < 1:
        raise ValueError(f"tile: expected a height and a width of at least 1, got {list(tile)}")
    rules = SizeRules.from_pretrained(backbone)
    rules.check(num_frames, height=height, width=width)
    motion = None
    if cascade:
        motion_height = rules.nearest(height / scale) if motion_height is None else motion_height
        motion_width = rules.nearest(width / scale) if motion_width is None else motion_width
        rules.check(num_frames, motion_height=motion_height, motion_width=motion_width)
        rules.check_cascade((motion_height, motion_width), (height, width))
        motion = (num_frames, motion_height, motion_width)
    video = VideoPlan(
        (num_frames, height, width),
        motion,
        steps,
        skip_steps,
        guidance,
        refine_guidance,
        upsampling=upsampling,
        tile=tile,
        offload=offload,
    )
    speed = gpu_speed(gpu, gpu_tflops)
    configs = PartConfigs.from_pretrained(backbone, vluer, refiner, shift)
    parts = Parts(configs, getattr(torch, dtype), vae_dtype=getattr(torch, vae_dtype))
    for name, folder in expert_folders(experts).items():
        load_expert(parts.refiner, folder, name)
    stages = Planner(parts, video, speed).stages()
    print(plan_text(stages, speed))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(plan_dict(video, stages, speed), indent=2) + "\n", encoding="utf-8")
