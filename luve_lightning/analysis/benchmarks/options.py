"""`luve bench --subject options`: what options of speed and memory gain and change in the third stage."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from luve_lightning.analysis.benchmarks.experts import EXPERTS, randomize_expert
from luve_lightning.analysis.benchmarks.generate import BANDS, Setup, mini, wan
from luve_lightning.analysis.model_parts import Parts
from luve_lightning.cascade.options import Guidance
from luve_lightning.cascade.pipeline import LuVePipeline
from luve_lightning.cascade.speed import SpeedOptions
from luve_lightning.cascade.stages import refine
from luve_lightning.machine import measure_ms, measure_peak_mib
from luve_lightning.models.backbones import denoiser_of, latent_space_of
from luve_lightning.models.experts import add_expert

STEPS, SKIP = 12, 2


@dataclass(frozen=True)
class Variant:
    """One way to run.

    Attributes:
        name: name of the option.
        speed: options of the pipeline.
        guidance: guidance.
        needs_gpu: whether a CPU has nothing to measure.
    """

    name: str
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    guidance: Guidance = field(default_factory=Guidance)
    needs_gpu: bool = False


VARIANTS = (
    Variant("none"),
    Variant("guidance batched", guidance=Guidance(batched=True)),
    Variant("guidance for sigma in [0.5, 0.95]", guidance=Guidance(low=0.5, high=0.95)),
    Variant("attention _native_cudnn", SpeedOptions(attention_backend="_native_cudnn"), needs_gpu=True),
    Variant("attention _native_flash", SpeedOptions(attention_backend="_native_flash"), needs_gpu=True),
    Variant("cache first_block, threshold 0.05", SpeedOptions(cache="first_block")),
    Variant("cache first_block, threshold 0.2", SpeedOptions(cache="first_block", cache_threshold=0.2)),
    Variant("cache taylorseer, interval 3", SpeedOptions(cache="taylorseer")),
    Variant("offload", SpeedOptions(offload=True), needs_gpu=True),
    Variant("compile", SpeedOptions(compile=True), needs_gpu=True),
)


def measure(
    device: torch.device,
    repeats: int = 1,
    backbone: str | None = None,
    refiner: str | None = None,
    video: tuple[int, int, int] | None = None,
    prompt: str = "",
) -> Iterator[dict[str, Any]]:
    """Measure the third stage by each option of speed and memory: 10 of 12 steps, both experts in their bands.

    Args:
        device: where.
        repeats: timed runs of each option after the first; the median counts.
        backbone: trained weights; None uses random ones, of Wan2.1-1.3B's size on a GPU and small ones on a CPU.
            How much a cache skips and changes depends on the weights: random ones say nothing about it.
        refiner: the third stage's own transformer, with a backbone.
        video: frames, height and width in pixels; None means 49x720x1280 on a GPU and 5x64x64 on a CPU.
        prompt: prompt, with a backbone.

    Returns:
        Rows with the seconds of all steps, the ratio to the run without options, `peak_mib` of everything
        allocated (on a CPU, of what the run adds), and `difference`, the root mean square of the change of the
        latents relative to them.
    """
    if video is None:
        video = mini().sizes["2k"] if device.type == "cpu" else wan().sizes["720p"]
    plain: Tensor | None = None
    plain_seconds = 0.0
    for variant in VARIANTS:
        if variant.needs_gpu and device.type == "cpu":
            continue
        pipeline = _pipeline(device, backbone, refiner, variant.speed.offload)
        pipeline.apply(variant.speed)
        space = latent_space_of(pipeline.vae)
        grid = space.latent_size(*video)
        draw = torch.Generator("cpu").manual_seed(2)
        latents = torch.randn(1, space.channels, *grid, generator=draw).to(device)
        inputs = _inputs(pipeline, device, prompt, backbone is None)
        run = partial(_refined, pipeline, latents, variant.guidance, inputs)
        result = run()
        seconds = statistics.median(measure_ms(run, device)[1] for _ in range(repeats)) / 1e3
        resident = torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else 0
        peak = resident + measure_peak_mib(run, device)
        if plain is None:
            plain, plain_seconds = result, seconds
        yield {
            "subject": "options",
            "option": variant.name,
            "weights": backbone or "random",
            "latents": list(latents.shape[2:]),
            "seconds": round(seconds, 4),
            "ratio": round(seconds / plain_seconds, 4),
            "peak_mib": round(peak, 1),
            "difference": float(f"{((result - plain).square().mean() / plain.square().mean()).sqrt():.4g}"),
        }
        del pipeline, run, inputs
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _refined(pipeline: LuVePipeline, latents: Tensor, guidance: Guidance, inputs: dict[str, Any]) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return refine(pipeline, latents, skip_steps=SKIP, steps=STEPS, guidance=guidance, generator=generator, **inputs)


def _pipeline(device: torch.device, backbone: str | None, refiner: str | None, offload: bool) -> LuVePipeline:
    """A fresh pipeline each time: some options cannot be undone."""
    torch.manual_seed(0)
    if backbone is not None:
        pipeline: LuVePipeline = LuVePipeline.from_pretrained(backbone, refiner=refiner)
    else:
        setup: Setup = mini() if device.type == "cpu" else wan()
        parts = Parts(setup.configs, setup.dtype, device)
        scheduler = setup.configs.family.build_schedule(setup.configs.shift).scheduler
        no_text: Any = None  # the prompt is embedded already
        pipeline = LuVePipeline(no_text, no_text, parts.codec.vae, scheduler, parts.transformer)
    model = pipeline.refinement_transformer
    for name, config in EXPERTS.items():
        add_expert(model, name, replace(config, band=BANDS[name]))
        randomize_expert(model, name, std=0.002)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline if offload else pipeline.to(device)


def _inputs(pipeline: LuVePipeline, device: torch.device, prompt: str, random: bool) -> dict[str, Any]:
    if not random:
        return {"prompt": prompt}
    denoiser = denoiser_of(pipeline.transformer)
    dtype, shape = denoiser.dtype, (1, 64 if device.type == "cpu" else 512, denoiser.text_dim)
    draw = torch.Generator("cpu").manual_seed(1)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: torch.randn(shape, generator=draw).to(device, dtype) for name in names}
