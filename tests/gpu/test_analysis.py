"""What a plan says of memory against what PyTorch allocates on a GPU, and what is measured of the GPU itself."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from luve_lightning.analysis.cost import gpu_speed
from luve_lightning.analysis.model_parts import PartConfigs, Parts, StepProgram, decode
from luve_lightning.analysis.planner import Planner
from luve_lightning.analysis.recipe_plan import plan_captions_embedded
from luve_lightning.analysis.training_plan import plan_step
from luve_lightning.cascade.options import CascadeOptions
from luve_lightning.cascade.speed import SpeedOptions
from luve_lightning.machine import measure_ms, measure_peak_mib
from luve_lightning.models.attention import Attention
from luve_lightning.models.attention.tiles import Tiles
from luve_lightning.models.attention.windows import Windows
from luve_lightning.models.backbones import Denoiser, denoiser_of, family_named
from luve_lightning.models.experts import add_expert
from luve_lightning.tasks import AdaptationTask, ExpertTask
from luve_lightning.tasks.watched_steps import watched_steps
from tests.helpers.noise import noise
from tests.helpers.wide_wan import EXPERTS

pytestmark = pytest.mark.only_gpu

GIB = 2**30
# 72 million parameters; a step on 7200 tokens takes one to two GiB, so that what libraries keep for themselves is
# little beside it.
SIZES = {"num_attention_heads": 6, "attention_head_dim": 128, "ffn_dim": 4096, "num_layers": 6, "text_dim": 512}
LATENTS, TEXT = (5, 72, 80), 128
CONFIGS = PartConfigs(
    transformer=SIZES,
    vae={"base_dim": 96, "num_res_blocks": 1},
    text_encoder={"vocab_size": 128, "d_model": 512, "d_kv": 64, "d_ff": 128, "num_layers": 1, "num_heads": 4},
    vluer={"channels": 16, "pairs": 1, "hidden": 32, "query_channels": 16, "decoder_layers": 1},
    text_length=TEXT,
)
WINDOWS, TILES = Windows(((1, 4, 4), (5, 2, 2)), linear=True), Tiles((4, 8, 8), (2, 3, 3))


def peak(run: Callable[[], object]) -> int:
    """Bytes at the peak of a second run, everything resident included."""
    run()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize(
    ("task", "attention", "options"),
    [
        ("adaptation", None, {"recompute": "nothing"}),
        ("adaptation", WINDOWS, {"recompute": "all_but_attention", "keep_attention": 3}),
        ("adaptation", TILES, {"recompute": "blocks", "offload": True, "chunks": 4}),
        ("lfe", None, {"recompute": "blocks"}),
        ("lfe", WINDOWS, {"recompute": "all_but_attention"}),
        ("hfe", TILES, {"recompute": "nothing"}),
    ],
    ids=str,
)
def test_a_training_step_takes_what_is_planned(
    tmp_path: Path, device: torch.device, task: str, attention: Attention | None, options: dict[str, Any]
) -> None:
    """By the task's own Trainer: bf16-mixed, clipping, AdamW. The plan is of the same transformer without values."""
    with device:
        made = denoiser_of(family_named("wan").from_config("transformer", SIZES))
    made.save(tmp_path / "transformer", torch.bfloat16)
    del made
    common: dict[str, Any] = {"attention": attention, **options}
    trained = (
        AdaptationTask(str(tmp_path), **common)
        if task == "adaptation"
        else ExpertTask(str(tmp_path), EXPERTS[task], task, dtype="bfloat16", **common)
    )
    batch = {"latents": noise(1, 16, *LATENTS), "text": noise(1, TEXT, SIZES["text_dim"])}
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    watched_steps(trained, [batch], tmp_path, "cuda", "bf16-mixed", steps=2)
    measured = torch.cuda.max_memory_allocated()
    step = plan_step(planned(task, attention, options), task, LATENTS, 1, TEXT, torch.bfloat16)
    assert measured > GIB / 2
    assert step.peak == pytest.approx(measured, rel=0.15)


def test_padded_captions_take_what_is_planned(device: torch.device) -> None:
    """And are masked right. Without a fused kernel for the mask, they would take several times as much."""
    sizes = {"vocab_size": 128, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 4, "num_heads": 32}
    configs = replace(CONFIGS, text_encoder=sizes | {"feed_forward_proj": "gated-gelu"}, text_length=512)
    text_encoder = Parts(configs, torch.bfloat16, device).text_encoder
    ids = torch.randint(3, 128, (8, 512), device=device)
    mask = torch.ones_like(ids).tril(100)  # the first caption has 101 tokens
    states, own = configs.family.text_class.states, mask.bool()
    with torch.inference_mode():
        measured = peak(lambda: states(text_encoder, ids, mask))
        half = states(text_encoder, ids, mask)[own].float()
        exact = states(text_encoder.float(), ids, mask)[own]
    found = plan_captions_embedded(configs, 512, 8, "bfloat16", None, None)
    assert measured > GIB / 2
    assert found.peak == pytest.approx(measured, rel=0.15)
    assert (half - exact).norm() < 0.03 * exact.norm()  # without the mask it is half as large as they are


def planned(task: str, attention: Attention | None, options: dict[str, Any]) -> Denoiser:
    """The transformer as the task sets it up, on the meta device."""
    dtype = torch.float32 if task == "adaptation" else torch.bfloat16
    transformer = Parts(CONFIGS, dtype).transformer.train().requires_grad_(task == "adaptation")
    denoiser = denoiser_of(transformer)
    denoiser.use_attention(attention)
    if task != "adaptation":
        add_expert(transformer, task, EXPERTS[task], dtype=torch.float32)
    denoiser.set_recompute(**options)
    return denoiser


@pytest.mark.parametrize(
    ("tile", "half"), [(None, False), ((30, 52), False), (None, True)], ids=["whole", "tiles", "half, whole"]
)
def test_decoding_takes_what_is_planned(device: torch.device, tile: tuple[int, int] | None, half: bool) -> None:
    video = CascadeOptions(480, 832, 17, 240, 416, steps=4, skip_steps=2)
    running = SpeedOptions(offload=True, decode_tile=tile, decode_half=half)
    planner = Planner(Parts(CONFIGS, torch.bfloat16), video, running)
    parts = Parts(CONFIGS, torch.bfloat16, device, torch.bfloat16 if half else torch.float32)
    latents = torch.randn(1, 16, *planner.grid, device=device)
    with torch.no_grad():
        # In half precision, pixels leave the GPU part by part.
        out = torch.empty(1, 3, 17, 480, 832) if half else None
        measured = peak(partial(decode, parts, latents, tile, out))
    assert measured > GIB / 2
    assert planner.decoding().peak == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("attention", [None, WINDOWS, TILES], ids=str)
def test_a_denoising_step_takes_what_is_planned(device: torch.device, attention: Attention | None) -> None:
    video = CascadeOptions(1152, 1280, 17, 576, 640, steps=10, skip_steps=2)
    parts, plan = (Parts(CONFIGS, torch.bfloat16, where) for where in (device, "meta"))
    for each in (parts, plan):
        denoiser_of(each.transformer).use_attention(attention)
        for name, expert in EXPERTS.items():
            add_expert(each.transformer, name, expert)
        each.transformer.requires_grad_(False)
    planner = Planner(plan, video, SpeedOptions(offload=True))
    step = StepProgram(parts, "refine", planner.grid, 10, 2, among=planner.steps_of("refine", planner.grid, "hfe"))
    with torch.no_grad():
        measured = peak(partial(step, "hfe"))
    assert planner.one_step("refine", planner.grid, "hfe").peak == pytest.approx(measured, rel=0.15)


def test_memory_is_exact_and_time_waits_for_the_work(device: torch.device) -> None:
    there = torch.ones(2**20, device=device)
    matrix = torch.ones(4096, 4096, device=device)

    def operation() -> torch.Tensor:
        for _ in range(20):
            torch.mm(matrix, matrix)
        return (there + 1) * 2  # less than the product

    operation()
    assert measure_peak_mib(operation, device) == 64
    _, ms = measure_ms(operation, device)
    start = time.perf_counter()
    operation()
    torch.cuda.synchronize()
    assert ms == pytest.approx((time.perf_counter() - start) * 1e3, rel=0.5)


def test_the_gpu_that_is_here_is_measured() -> None:
    found = gpu_speed(None, None)
    assert found is not None
    assert 0 < found.tflops["attention"] < 5000
    assert found.tflops["matmul"] / found.tflops["attention"] == pytest.approx(600 / 580)
    assert 0 < found.bandwidth < 50
