"""`luve bench --subject experts-train`: one training step of the adaptation and of each expert, with random weights."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luve_lightning.analysis.benchmarks.experts import (
    BenchModel,
    Size,
    attention_name,
    attention_named,
    attention_share,
    bench_model,
    randomize_expert,
    write_profile,
)
from luve_lightning.functional.frequency import FrequencyFilter
from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.machine import measure_ms
from luve_lightning.models.backbones import Recompute, denoiser_of
from luve_lightning.models.experts import ExpertConfig
from luve_lightning.tasks import AdaptationTask, ExpertTask, FlowMatchingTask

# experiments/experts/{adaptation,lfe,hfe}-2k.yaml
_LFE = ExpertConfig("attention", 32, 32, FrequencyFilter("low", 0.5), SigmaBand(0.875, 1.0))
_HFE = ExpertConfig("feed_forward", 32, 32, FrequencyFilter("high", 0.5), SigmaBand(0.0, 0.875))
# Number of blocks of 30: the optimiser's state and the gradients of all weights leave room for these on a card of
# 80 GB.
_KEPT_IN_ADAPTATION = 22


def measure(
    device: torch.device,
    repeats: int = 1,
    size: Size = "2k",
    tasks: str = "adaptation,lfe,hfe",
    attention: str = "own",
    compile: bool = False,
    recompute: Recompute = "all_but_attention",
    keep_attention: int | None = None,
    offload: bool = False,
    chunks: int = 1,
    profile: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Time one training step of the adaptation and of each expert beside the forward pass.

    Args:
        device: a GPU runs Wan2.1-1.3B under bfloat16 autocast, a CPU the mini backbone in float32.
        repeats: steps after a warm-up, which is on one latent frame unless blocks are compiled; the least time counts.
        size: 2k or 4k, 49 frames; on a CPU two small sizes.
        tasks: some of adaptation, lfe and hfe, separated by commas.
        attention: replaces the transformer's own self-attention: the beginning of a name of `--subject attention`,
            such as windows or tiles, or a record such as '{"name": "Windows", "cuts": [[1, 4, 4]]}'.
        compile: compile the transformer's blocks.
        recompute: see `Denoiser.set_recompute`.
        keep_attention: see `Denoiser.set_recompute`; default all blocks, and 22 in the adaptation.
        offload: see `Denoiser.set_recompute`.
        chunks: see `Denoiser.set_recompute`.
        profile: folder for a table of each task's kernels in one step.

    Yields:
        One row for each task, as it is measured: seconds of the forward pass and of the step, their ratio, the share
        of a replaced attention in the forward pass, and on a GPU the step's peak GiB, everything resident included.

    Raises:
        ValueError: for an unknown task.
    """
    model, replaced = bench_model(device, size), attention_named(attention, size)
    wanted = tasks.split(",")
    with tempfile.TemporaryDirectory() as folder:
        denoiser_of(model.transformer(device)).save(Path(folder) / "transformer", model.dtype)
        dtype = "float32" if model.dtype == torch.float32 else "bfloat16"
        kept = keep_attention
        if kept is None and recompute == "all_but_attention":
            kept = min(_KEPT_IN_ADAPTATION, model.sizes["num_layers"])
        options: dict[str, Any] = {"recompute": recompute, "offload": offload, "chunks": chunks, "attention": replaced}
        options["compile"] = "inductor" if compile else None
        frozen = options | {"dtype": dtype, "keep_attention": keep_attention}
        makers: dict[str, Callable[[], FlowMatchingTask]] = {
            "adaptation": lambda: AdaptationTask(folder, keep_attention=kept, **options),
            "lfe": lambda: ExpertTask(folder, _LFE, "lfe", **frozen),
            "hfe": lambda: ExpertTask(folder, _HFE, "hfe", **frozen),
        }
        if unknown := [task for task in wanted if task not in makers]:
            raise ValueError(f"tasks: expected some of {', '.join(makers)}, got {', '.join(unknown)}")
        for name in wanted:
            table = None if profile is None else profile / f"{name}.txt"
            row: dict[str, Any] = {"subject": "experts-train", "model": model.name, "task": name, "size": size}
            row |= {"latents": list(model.latents), "attention": attention_name(replaced), "compile": compile}
            row |= {"recompute": recompute, "keep_attention": kept if name == "adaptation" else keep_attention}
            try:
                measured = _measure(makers[name]().to(device), model, device, repeats, compile, table)
            except torch.OutOfMemoryError as error:
                measured = {"error": str(error).partition(". ")[0]}
            yield row | {"offload": offload, "chunks": chunks} | measured
            gc.collect()
            if compile:
                torch.compiler.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _measure(
    task: FlowMatchingTask, model: BenchModel, device: torch.device, repeats: int, compiled: bool, table: Path | None
) -> dict[str, Any]:
    task.train()
    if isinstance(task, ExpertTask):
        randomize_expert(task.transformer, task.name)
    trained = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    text = torch.randn(1, model.text, model.sizes["text_dim"], device=device)
    sigma = task.band.levels(1, task.shift).to(device)
    precision = torch.autocast(device.type, model.dtype, enabled=model.dtype != torch.float32)

    def forward(latents: Tensor) -> Tensor:
        with precision:
            return task.losses_of(latents, text, sigma, torch.randn_like(latents)).mean()

    def step(latents: Tensor) -> None:
        forward(latents).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    batch = torch.randn(1, 16, *model.latents, device=device)
    started = time.perf_counter()
    step(batch if compiled else batch[:, :, :1])
    with torch.no_grad():
        if compiled:
            forward(batch)
        prepared = time.perf_counter() - started
        share = attention_share(task.denoiser, partial(forward, batch), device)
        forward_ms = min(measure_ms(partial(forward, batch), device)[1] for _ in range(repeats))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step_ms = min(measure_ms(partial(step, batch), device)[1] for _ in range(repeats))
    peak = {"peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 1)} if device.type == "cuda" else {}
    if table is not None:
        write_profile(partial(step, batch), device, table)
    return {
        "warm_up_s": round(prepared, 1),
        "trained_parameters": sum(p.numel() for p in trained),
        "forward_s": round(forward_ms / 1e3, 3),
        "step_s": round(step_ms / 1e3, 3),
        "ratio": round(step_ms / forward_ms, 3),
        "attention_share": share,
    } | peak
