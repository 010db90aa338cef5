"""`luve plan`, `luve bench`: what a configuration takes, estimated before it runs, and what models take, measured."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from luve_lightning.analysis.cost import GpuSpeed, gpu_speed
from luve_lightning.analysis.dry_run import weight_bytes
from luve_lightning.analysis.model_parts import PartConfigs, Parts
from luve_lightning.analysis.plan import beside_made, plan_dict, plan_text, recipe_dict, recipe_text, shared_stages
from luve_lightning.analysis.planner import Planner
from luve_lightning.analysis.recipe_plan import (
    RecipePlan,
    cascade_parts,
    clips_there,
    plan_captions_embedded,
    plan_clips_upsampled,
    plan_scores,
    plan_windows_encoded,
    planned_vluer,
)
from luve_lightning.cascade.options import CascadeOptions
from luve_lightning.cascade.speed import SpeedOptions
from luve_lightning.cascade.upsampling import LooseModels
from luve_lightning.cascade.upsampling import baselines as known_baselines
from luve_lightning.cli import Verb
from luve_lightning.data.latent_store import LatentRecipe
from luve_lightning.data.text_store import captions_of
from luve_lightning.data.variants import PixelTransform, Unchanged, variant_name
from luve_lightning.data.video_index import Limits, Split
from luve_lightning.datamodules.buckets import Buckets, LengthChoice, SizeChoice
from luve_lightning.files import check_writable, read_json, write_text
from luve_lightning.machine import choose_device
from luve_lightning.models.attention import Attention, named_attention
from luve_lightning.models.backbones import load_backbone

VERBS = {
    "plan": Verb(
        "Measurement",
        "estimate what a configuration takes, before anything runs",
        examples=("experiments/generate/mini.yaml", "experiments/vluer/mini.yaml"),
        reads="generate",
        kinds=("fit", "precompute", "embed", "score", "upsample"),
    ),
    "bench": Verb(
        "Measurement", "time the models and measure their memory", subjects="luve_lightning.analysis.benchmarks"
    ),
}

Dtype = Literal["float32", "bfloat16", "float16"]
_SPEED = SpeedOptions()


def plan(
    backbone: str,
    options: CascadeOptions,
    vluer: Path | None = None,
    refiner: str | None = None,
    transformer: Path | None = None,
    experts: dict[str, Path | None] | Path | None = None,
    attention: Attention | str | None = None,
    dtype: Dtype = "bfloat16",
    vae_dtype: Dtype = "float32",
    speed: SpeedOptions = _SPEED,
    context_parallel: int = 1,
    tile: tuple[int, int] | None = None,
    offload: bool = False,
    gpu: str | None = None,
    gpu_tflops: float | None = None,
    made: Path | None = None,
    output: Path | None = None,
) -> None:
    """Says what a video takes before it is made, or what any other configuration takes (see --config FILE --help).

    That is latents, tokens, steps, FLOPs, peak memory and time of each stage. Only configuration files are read, no
    weights (except those of experts). The models' own code is traced without values, tensor by tensor. Memory is what
    PyTorch allocates for one video; the CUDA context, about half a GiB, and fragmentation come on top. Times are
    estimates. A configuration of luve generate says all that is needed: luve plan --config
    experiments/generate/2k.yaml; its keys that make no difference are skipped.

    Args:
        backbone: Folder of a diffusers pipeline, or a hub id whose configuration files are available.
        options: How the video is made.
        vluer: Folder of a VLUer; default the base size with Wan2.1's latents.
        refiner: Backbone, folder or file of the third stage's own transformer; default the first stage's.
        transformer: That of the first stage; default the backbone's.
        experts: Folder of each expert by name, or one folder of all of them; default none.
        attention: What replaces self-attention in the third stage's transformer; default what its configuration
            says.
        dtype: Dtype of the transformers' and the text encoder's weights.
        vae_dtype: Dtype of the VAE's and the VLUer's weights.
        speed: Options of speed and memory, of which compile, offload and decode_tile are planned.
        context_parallel: GPUs that share the video.
        tile: Short for speed.decode_tile.
        offload: Short for speed.offload.
        gpu: Estimate times for an h200, or by the speed in a file of luve bench --subject speed --output FILE;
            default the GPU of this machine, if any, of which a second's measurement says less.
        gpu_tflops: TFLOP/s that attention reaches on your GPU.
        made: Record of such a video that `luve generate` made, the .json file beside it: also show its seconds and
            memory beside the planned ones.
        output: Also write everything to this file, FILE.json. Another path is luve generate's folder of videos.
    """
    if tile is not None and min(tile) < 1:
        raise ValueError(f"tile: expected a height and a width of at least 1, got {list(tile)}")
    speed = replace(speed, decode_tile=tile or speed.decode_tile, offload=offload or speed.offload)
    if speed.cache is not None:
        raise ValueError(f"speed.cache: {speed.cache} skips work that depends on the video; expected null for a plan")
    rules = load_backbone(backbone).size_rules()
    options = options.resolved(rules)
    rules.check_cascade(options.motion[1:], options.size[1:])
    rates = gpu_speed(gpu, gpu_tflops)
    record = None if made is None else read_json(made)
    models = {"vluer": vluer, "refiner": refiner, "transformer": transformer}
    dtypes = getattr(torch, dtype), getattr(torch, vae_dtype)
    replaced = None if attention is None else named_attention(attention)
    parts, notes = cascade_parts(backbone, options, dtypes, models, experts, replaced)
    planner = Planner(parts, options, speed, rates)
    stages, passes = shared_stages(planner, context_parallel), planner.forward_passes()
    print("\n".join([plan_text(stages, rates, passes, context_parallel), *notes]))
    if record is not None:
        print(f"\n{beside_made(stages, record)}")
    _write(output, plan_dict(options, stages, rates, passes, context_parallel))


def plan_fit(
    model: dict[str, Any],
    data: dict[str, Any],
    trainer: dict[str, Any] | None = None,
    gpu: str | None = None,
    gpu_tflops: float | None = None,
    output: Path | None = None,
) -> None:
    """Says what a training takes: memory of a step in each bucket by strategy, seconds, GPU-hours.

    Only configuration files are read: the models' own code is traced without values, forward and backward. A
    configuration of luve fit says all that is needed: luve plan --config experiments/experts/lfe-2k.yaml; what makes no
    difference is skipped. It is for the VLUer, the adaptation and the experts. A step holds forward and backward pass,
    what is recomputed, clipping and AdamW. It leaves out loading, validation's time, checkpoints, callbacks (an EMA is
    a copy of what is trained) and what GPUs tell each other, most of which runs beside the backward pass.

    Args:
        model: The task, as luve fit takes it. A backbone that is not there yet, such as an adaptation's export, is
            planned with the data's.
        data: The data, as luve fit takes it.
        trainer: Of the Trainer's options those count that decide steps, precision, strategy and devices.
        gpu: Estimate times for an h200, or by the speed in a file of luve bench --subject speed --output FILE;
            default the GPU of this machine, if any, of which a second's measurement says less.
        gpu_tflops: TFLOP/s that attention reaches on your GPU.
        output: Also write everything to this file, FILE.json.
    """
    # Imported here: it brings Lightning, without which the other verbs begin two seconds earlier.
    from luve_lightning.analysis.fit_plan import plan_training

    rates = gpu_speed(gpu, gpu_tflops)
    _tell(plan_training(model, data, trainer or {}, rates), rates, output)


def plan_precompute(
    backbone: str,
    size: SizeChoice,
    scales: list[float],
    frames: LengthChoice,
    index: Path | None = None,
    splits: list[Split] | None = None,
    clips: Path | None = None,
    keep: Limits = Limits(),  # noqa: B008  # frozen
    start: int = 0,
    windows: int = 1,
    stride: int = 1,
    fps: float | None = None,
    variants: dict[str, PixelTransform] | None = None,
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    batch_size: int = 4,
    trainer: dict[str, Any] | None = None,
    gpu: str | None = None,
    gpu_tflops: float | None = None,
    output: Path | None = None,
) -> None:
    """Says what encoding clips takes: seconds, memory and bytes of a clip; hours and terabytes of the index.

    It takes a configuration of luve precompute, and counts nothing as stored already. Without the index it says what a
    thousand clips take.

    Args:
        backbone: As luve precompute takes it, of which configuration files are read.
        size: See luve precompute, as for what follows.
        scales: How many times smaller each low resolution is.
        frames: Frames per window.
        index: The clips; those that fit no bucket are left out.
        splits: Splits to encode.
        clips: Folder of the clips.
        keep: Which clips to take.
        start: First frame of the first window.
        windows: Windows per clip.
        stride: Read every stride-th frame.
        fps: Frames a second that are read.
        variants: Transforms of the pixels, by name.
        dtype: Dtype on disk.
        batch_size: Windows encoded at once.
        trainer: Of the Trainer's options precision and devices count.
        gpu: See luve plan.
        gpu_tflops: See luve plan.
        output: Also write everything to this file, FILE.json.
    """
    from luve_lightning.analysis.fit_plan import encoding_buckets, precision_of, processes_of

    rates = gpu_speed(gpu, gpu_tflops)
    options = {"precision": "32-true"} | (trainer or {})
    half = precision_of(options)
    parts = Parts(PartConfigs.from_pretrained(backbone), torch.bfloat16, vae_dtype=half or torch.float32)
    transforms = variants or {"plain": Unchanged()}
    names = tuple(variant_name(name, transform) for name, transform in transforms.items())
    rules = load_backbone(backbone).size_rules()
    buckets = Buckets.chosen(size, frames, lambda: rules.step)
    buckets.check_scales(scales, parts.codec.spatial_ratio, size)
    first = next(iter(buckets))
    recipe = LatentRecipe("plan", first.size, tuple(scales), first.frames, start, windows, stride, names, dtype, fps)
    entries = clips_there(index, clips, keep, splits)
    shares, counts = encoding_buckets(buckets, recipe, entries)
    kept = weight_bytes(parts.codec) * 2 if half is not None else 0
    found = plan_windows_encoded(
        parts, shares, list(transforms.values()), batch_size, getattr(torch, dtype), rates, counts,
        processes_of(options), kept,
    )  # fmt: skip
    _tell(found, rates, output)


def plan_embed(
    backbone: str,
    index: Path | None = None,
    columns: list[str] | None = None,
    splits: list[Split] | None = None,
    clips: Path | None = None,
    keep: Limits = Limits(),  # noqa: B008  # frozen
    length: int | None = None,
    batch_size: int = 8,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    gpu: str | None = None,
    gpu_tflops: float | None = None,
    output: Path | None = None,
) -> None:
    """Says what embedding captions takes: seconds, memory and bytes of a caption, and of the index.

    It takes a configuration of luve embed, and counts nothing as stored already.

    Args:
        backbone: As luve embed takes it, of which configuration files are read.
        index: The clips; without it, a thousand captions are told.
        columns: Caption columns.
        splits: Splits to embed.
        clips: Folder of the clips.
        keep: Which clips to take.
        length: Tokens that a caption is padded to.
        batch_size: Captions embedded at once.
        dtype: Dtype of the text encoder's weights and on disk.
        gpu: See luve plan.
        gpu_tflops: See luve plan.
        output: Also write everything to this file, FILE.json.
    """
    rates = gpu_speed(gpu, gpu_tflops)
    entries = clips_there(index, clips, keep, splits)
    count = None if entries is None else len(captions_of(entries, columns or ["Summarized Description"]))
    configs = PartConfigs.from_pretrained(backbone)
    _tell(plan_captions_embedded(configs, length, batch_size, dtype, rates, count), rates, output)


def plan_score(
    scorer: dict[str, Any],
    index: Path | None = None,
    frames: int = 4,
    indices: list[int] | None = None,
    splits: list[Split] | None = None,
    clips: Path | None = None,
    keep: Limits = Limits(),  # noqa: B008  # frozen
    gpu: str | None = None,
    output: Path | None = None,
) -> None:
    """Says how many clips and frames luve score has to rate; what its scorer takes is unknown before it runs.

    Args:
        scorer: As luve score takes it.
        index: The clips.
        frames: Frames per clip.
        indices: Frame numbers instead.
        splits: Splits to score.
        clips: Folder of the clips.
        keep: Which clips to take.
        gpu: Makes no difference.
        output: Also write everything to this file, FILE.json.
    """
    entries = clips_there(index, clips, keep, splits)
    name = str(scorer.get("class_path")).rpartition(".")[2]
    found = plan_scores(name, len(indices or ()) or frames, None if entries is None else len(entries))
    _tell(found, None, output)


def plan_upsample(
    backbone: str,
    size: tuple[int, int],
    scale: float,
    frames: int,
    index: Path | None = None,
    vluers: dict[str, Path | None] | None = None,
    baselines: list[str] | None = None,
    super_resolution: dict[str, Path | None] | None = None,
    splits: list[Split] | None = None,
    clips: Path | None = None,
    keep: Limits = Limits(),  # noqa: B008  # frozen
    limit: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    gpu: str | None = None,
    gpu_tflops: float | None = None,
    output: Path | None = None,
) -> None:
    """Says what upsampling clips by several methods takes: seconds and memory of a clip, and hours of the index.

    Args:
        backbone: As luve upsample takes it, of which configuration files are read.
        size: Height and width of the high resolution.
        scale: How many times smaller the low resolution is.
        frames: Frames per clip.
        index: The clips; without it, a thousand are told.
        vluers: VLUer folders by name, of which configuration files are read.
        baselines: Methods without a VLUer; default all.
        super_resolution: Networks on pixels, which are named and not counted.
        splits: Splits to upsample.
        clips: Folder of the clips.
        keep: Which clips to take.
        limit: The first clips of each split.
        dtype: Dtype of the VAE's weights.
        gpu: See luve plan.
        gpu_tflops: See luve plan.
        output: Also write everything to this file, FILE.json.
    """
    rates = gpu_speed(gpu, gpu_tflops)
    entries = clips_there(index, clips, keep, splits, limit)
    parts = Parts(PartConfigs.from_pretrained(backbone), torch.bfloat16, vae_dtype=getattr(torch, dtype))
    models = LooseModels(parts.codec)
    methods: dict[str, Any] = {name: method.of(models) for name, method in known_baselines(baselines).items()}
    nets = {name: planned_vluer(backbone, folder) for name, folder in (vluers or {}).items() if folder is not None}
    methods |= {name: net for name, (net, _) in nets.items()}
    recipe = LatentRecipe("plan", (size[0], size[1]), (scale,), frames)
    count = None if entries is None else len(entries)
    modules, notes = [net for net, _ in nets.values()], [note for _, note in nets.values() if note]
    notes += [f"super_resolution.{name} is not counted: --measured times it" for name in super_resolution or {}]
    _tell(plan_clips_upsampled(parts, recipe, methods, modules, rates, count, notes), rates, output)


def _tell(plan: RecipePlan, speed: GpuSpeed | None, output: Path | None) -> None:
    """Print a plan, and write it where a file is meant."""
    print(recipe_text(plan, speed))
    _write(output, recipe_dict(plan, speed))


def _write(output: Path | None, found: Mapping[str, Any]) -> None:
    if output is not None and output.suffix == ".json":
        check_writable(output)
        write_text(output, json.dumps(found, indent=2) + "\n")
    elif output is not None:
        print(f"nothing is written to {output}; --output FILE.json also writes the plan")


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
