"""`luve plan`, `luve bench`, `luve random-models`: what generating a video takes, estimated and measured."""

from __future__ import annotations

import importlib
import inspect
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser
from rich.console import Console

from luve_lightning.analysis.cost import GpuSpeed, gpu_speed
from luve_lightning.analysis.model_parts import PartConfigs, Parts, wan_1_3b
from luve_lightning.analysis.plan import beside_made, plan_dict, plan_text, training_plan_text
from luve_lightning.analysis.planner import Planner
from luve_lightning.analysis.random_models import write_random_models
from luve_lightning.analysis.transformer_plan import TrainingStep, plan_step
from luve_lightning.cascade.options import CascadeOptions
from luve_lightning.cascade.pipeline_files import expert_folders
from luve_lightning.cascade.speed import SpeedOptions
from luve_lightning.cli import Verb
from luve_lightning.data.latent_store import LatentRecipe
from luve_lightning.files import read_json
from luve_lightning.machine import choose_device
from luve_lightning.models.attention import Attention, named_attention
from luve_lightning.models.backbones import denoiser_of, load_backbone
from luve_lightning.models.experts import add_expert, load_expert

VERBS = {
    "plan": Verb("Generation", "estimate what generating a video takes, before anything runs", reads="generate"),
    "plan-training": Verb("Training", "estimate what a training step takes in each bucket", reads="fit"),
    "bench": Verb(
        "Measurement", "time the models and measure their memory", subjects="luve_lightning.analysis.benchmarks"
    ),
    "random-models": Verb("Measurement", "write a cascade's models with random weights, at real size"),
}

# Dtype of autocast by the Trainer's precision.
_AUTOCAST = {"32-true": None, "32": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
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
    tile: tuple[int, int] | None = None,
    offload: bool = False,
    gpu: str | None = None,
    gpu_tflops: float | None = None,
    made: Path | None = None,
    output: Path | None = None,
) -> None:
    """Says what a video of some size takes: latents, tokens, steps, FLOPs, peak memory and time of each stage.

    Only configuration files are read, no weights (except those of experts). The models' own code is traced without
    values, tensor by tensor. Memory is what PyTorch allocates for one video; the CUDA context, about half a GiB,
    and fragmentation come on top. Times are estimates. A configuration of luve generate says all that is needed:
    luve plan --config experiments/generate/2k.yaml; its keys that make no difference are skipped.

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
    configs = PartConfigs.from_pretrained(backbone, vluer, refiner, options.shift, options.sampler, transformer)
    parts = Parts(configs, getattr(torch, dtype), vae_dtype=getattr(torch, vae_dtype))
    if attention is not None:
        denoiser_of(parts.refiner).use_attention(named_attention(attention))
    given: Mapping[str, Path] | Path | None
    given = {k: v for k, v in experts.items() if v is not None} if isinstance(experts, dict) else experts
    for name, folder in expert_folders(given).items():
        load_expert(parts.refiner, folder, name, any_attention=attention is not None)
    planner = Planner(parts, options, speed, rates)
    stages, passes = planner.stages(), planner.forward_passes()
    print(plan_text(stages, rates, passes))
    if record is not None:
        print(f"\n{beside_made(stages, record)}")
    if output is not None and output.suffix == ".json":
        output.parent.mkdir(parents=True, exist_ok=True)
        found = plan_dict(options, stages, rates, passes)
        output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    elif output is not None:
        print(f"nothing is written to {output}; --output FILE.json also writes the plan")


def plan_training(
    model: dict[str, Any],
    data: dict[str, Any],
    trainer: dict[str, Any] | None = None,
    gpu: str | None = None,
    gpu_tflops: float | None = None,
    output: Path | None = None,
) -> None:
    """Says what a training step takes in each bucket: tokens, batch, FLOPs, peak memory and time.

    Only configuration files are read: the model's own code is traced without values, forward and backward. A
    configuration of luve fit says all that is needed: luve plan-training --config experiments/experts/lfe-2k.yaml; what
    makes no difference is skipped. It is for the adaptation and the experts; memory is that of one GPU with nothing
    sharded, without the CUDA context, fragmentation and what callbacks keep, and as without compiling.

    Args:
        model: The task, AdaptationTask or ExpertTask, as luve fit takes it.
        data: The data, CaptionLatentsDataModule, as luve fit takes it.
        trainer: Of the Trainer's options precision counts.
        gpu: Estimate times for an h200, or by the speed in a file of luve bench --subject speed --output FILE;
            default the GPU of this machine, if any, of which a second's measurement says less.
        gpu_tflops: TFLOP/s that attention reaches on your GPU.
        output: Also write everything to this file, FILE.json.
    """
    # Imported here: they bring Lightning, without which the other verbs begin two seconds earlier.
    from luve_lightning.datamodules import CaptionLatentsDataModule
    from luve_lightning.tasks import AdaptationTask, ExpertTask

    rates = gpu_speed(gpu, gpu_tflops)
    kind, task = _typed("model", model, (AdaptationTask, ExpertTask))
    _, source = _typed("data", data, (CaptionLatentsDataModule,))
    precision = str((trainer or {}).get("precision") or "32-true")
    if precision not in _AUTOCAST:
        raise ValueError(f"trainer.precision: expected one of {', '.join(_AUTOCAST)} for a plan, got {precision!r}")
    steps = _training_steps(kind is ExpertTask, task, source, _AUTOCAST[precision], rates)
    print(training_plan_text(steps, rates))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        found = {"gpu": None if rates is None else rates.name, "buckets": [asdict(step) for step in steps]}
        output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _training_steps(
    expert: bool,
    task: Mapping[str, Any],
    data: Mapping[str, Any],
    autocast: torch.dtype | None = None,
    speed: GpuSpeed | None = None,
) -> list[TrainingStep]:
    """A step of every bucket, the largest bucket first.

    Args:
        expert: whether an expert is trained, and not the adaptation.
        task: arguments of ExpertTask or AdaptationTask, defaults included.
        data: arguments of CaptionLatentsDataModule, defaults included.
        autocast: see `plan_step`.
        speed: see `plan_step`.
    """
    from luve_lightning.datamodules.buckets import Buckets
    from luve_lightning.datamodules.sampling import batch_groups
    from luve_lightning.tasks.expert import add_lora

    dtype = getattr(torch, task["dtype"]) if expert else torch.float32
    configs = PartConfigs.from_pretrained(data["backbone"], transformer=task["backbone"])
    parts = Parts(configs, dtype)
    denoiser = denoiser_of(parts.transformer)
    denoiser.module.train()
    if task["attention"] is not None:
        denoiser.use_attention(task["attention"])
    if expert:
        add_expert(denoiser.module, task["name"], task["expert"], dtype=torch.float32)
    elif task["lora_rank"]:
        add_lora(denoiser, task["lora_rank"])
    else:
        denoiser.module.requires_grad_(True)
    denoiser.set_recompute(task["recompute"], task["keep_attention"], task["offload"], task["chunks"])
    buckets = Buckets.chosen(data["size"], data["frames"], lambda: load_backbone(data["backbone"]).size_rules().step)
    grids = {}
    for bucket in buckets:
        recipe = LatentRecipe("plan", bucket.size, () if data["scale"] == 1 else (data["scale"],), bucket.frames)
        grids[bucket] = parts.codec.latent_size(bucket.frames, *recipe.pixel_size(data["scale"]))
    volumes = {bucket: prod(grid) for bucket, grid in grids.items()}
    groups = batch_groups(buckets, list(buckets), volumes, data["batch_size"], fill_batches=data["fill_batches"])
    return [
        plan_step(
            denoiser,
            str(group.bucket),
            grids[group.bucket],
            group.batch_size,
            configs.text_length,
            autocast,
            speed,
            compiled=task["compile"] is not None,
        )
        for group in groups
    ]


def _typed(key: str, given: Mapping[str, Any], kinds: tuple[type[Any], ...]) -> tuple[type[Any], dict[str, Any]]:
    """A component's class and its arguments as the class takes them, defaults included; it is not made."""
    path = given.get("class_path")
    kind = next((kind for kind in kinds if str(path).rpartition(".")[2] == kind.__name__), None)
    if kind is None:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{key}.class_path: a plan is for {names}, got {path}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, key, instantiate=False)
    values = parser.instantiate(parser.parse_object({key: dict(given.get("init_args") or {})}))
    return kind, vars(values[key])


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


def random_models(
    output: Path,
    backbone: str | None = None,
    vluer: Path | None = None,
    attention: Attention | None = None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    seed: int = 0,
    refiner_alone: bool = False,
    device: str = "auto",
) -> None:
    """Writes a backbone, a VLUer, an adapted transformer and both experts with random weights.

    Time and memory do not depend on the weights' values: with these folders `luve generate`, `luve precompute` and
    `luve fit` can be tried and timed at real size before any training, and without a download. Videos are noise.

    Args:
        output: New folder; gets backbone/, vluer/, refiner/, experts/lfe/ and experts/hfe/.
        backbone: Folder or hub id whose configuration files give the sizes; default those of Wan2.1-1.3B, 18 GB in
            bfloat16.
        vluer: Folder whose configuration gives the VLUer's size; default the base size.
        attention: Attention of the adapted transformer; default the backbone's own.
        dtype: Dtype of the transformers and the text encoder; the others are float32.
        seed: Seed of the weights.
        refiner_alone: Write only refiner/ and experts/, for instance with another attention for another size.
        device: Where they are drawn: auto (a GPU if there is one), cpu, cuda or cuda:N.
    """
    console, started = Console(emoji=False), time.perf_counter()
    configs = wan_1_3b() if backbone is None else PartConfigs.from_pretrained(backbone, vluer)
    target, kind = choose_device(device), getattr(torch, dtype)
    written = write_random_models(output, configs, kind, target, attention, seed, refiner_alone)
    for name, count in written:
        took = f"{time.perf_counter() - started:.0f} s"
        console.print(f"  {output / name}  {count:,} parameters  ({took})", soft_wrap=True)
