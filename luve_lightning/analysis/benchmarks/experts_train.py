"""`luve bench --subject experts-train`: one training step of the adaptation and of each expert, with random weights."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luve_lightning.analysis.benchmarks.experts import BenchModel, bench_model, randomize_expert
from luve_lightning.analysis.cost import measure_ms
from luve_lightning.functional.frequency import FrequencyFilter
from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.models.backbones import Recompute, denoiser_of
from luve_lightning.models.experts import ExpertConfig
from luve_lightning.tasks import AdaptationTask, ExpertTask, FlowMatchingTask

# experiments/experts/{adaptation,lfe,hfe}-2k.yaml
_LFE = ExpertConfig("attention", 32, 32, FrequencyFilter("low", 0.5), SigmaBand(0.875, 1.0))
_HFE = ExpertConfig("feed_forward", 32, 32, FrequencyFilter("high", 0.5), SigmaBand(0.0, 0.875))
_RECOMPUTE: Recompute = "all_but_attention"
# Number of blocks of 30: the optimiser's state and the gradients of all weights leave room for these on a card of
# 80 GB.
_KEPT_IN_ADAPTATION = 22


def measure(device: torch.device, repeats: int = 1) -> Iterator[dict[str, Any]]:
    """Time one training step of the adaptation and of each expert beside the forward pass.

    Args:
        device: a GPU runs Wan2.1-1.3B at 2K under bfloat16 autocast, a CPU the mini backbone in float32.
        repeats: steps after a warm-up on one latent frame; the least time counts.

    Yields:
        One row for the adaptation and each expert, as it is measured: seconds of the forward pass and of the step,
        their ratio, and on a GPU the step's peak GiB, everything resident included.
    """
    size = bench_model(device)
    with tempfile.TemporaryDirectory() as folder:
        denoiser_of(size.transformer(device)).save(Path(folder) / "transformer", size.dtype)
        dtype = "float32" if size.dtype == torch.float32 else "bfloat16"
        kept = min(_KEPT_IN_ADAPTATION, size.sizes["num_layers"])
        makers: dict[str, Callable[[], FlowMatchingTask]] = {
            "adaptation": lambda: AdaptationTask(folder, recompute=_RECOMPUTE, keep_attention=kept),
            "lfe": lambda: ExpertTask(folder, _LFE, "lfe", dtype=dtype, recompute=_RECOMPUTE),
            "hfe": lambda: ExpertTask(folder, _HFE, "hfe", dtype=dtype, recompute=_RECOMPUTE),
        }
        for name, make in makers.items():
            row = {"subject": "experts-train", "model": size.name, "task": name, "latents": list(size.latents)}
            yield row | {"recompute": _RECOMPUTE} | _measure(make().to(device), size, device, repeats)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _measure(task: FlowMatchingTask, size: BenchModel, device: torch.device, repeats: int) -> dict[str, Any]:
    task.train()
    if isinstance(task, ExpertTask):
        randomize_expert(task.transformer, task.name)
    trained = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    text = torch.randn(1, size.text, size.sizes["text_dim"], device=device)
    sigma = task.band.levels(1, task.shift).to(device)
    precision = torch.autocast(device.type, size.dtype, enabled=size.dtype != torch.float32)

    def forward(latents: Tensor) -> Tensor:
        with precision:
            return task.losses_of(latents, text, sigma, torch.randn_like(latents)).mean()

    def step(latents: Tensor) -> None:
        forward(latents).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(torch.randn(1, 16, 1, *size.latents[1:], device=device))
    batch = torch.randn(1, 16, *size.latents, device=device)
    with torch.no_grad():
        forward_ms = min(measure_ms(partial(forward, batch), device)[1] for _ in range(repeats))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step_ms = min(measure_ms(partial(step, batch), device)[1] for _ in range(repeats))
    peak = {"peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 1)} if device.type == "cuda" else {}
    return {
        "trained_parameters": sum(p.numel() for p in trained),
        "forward_s": round(forward_ms / 1e3, 3),
        "step_s": round(step_ms / 1e3, 3),
        "ratio": round(step_ms / forward_ms, 3),
    } | peak
