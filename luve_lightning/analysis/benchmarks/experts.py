"""`luve bench --subject experts`: a forward pass with and without an expert, with random weights."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from luve_lightning.analysis.cost import measure_ms, measure_peak_mib
from luve_lightning.analysis.model_parts import cast_weights, wan_1_3b
from luve_lightning.functional.frequency import FrequencyFilter
from luve_lightning.models.backbones import Denoiser, denoiser_of, family_named
from luve_lightning.models.experts import ExpertConfig, activate, add_expert, expert_parameters

RANK = 32
EXPERTS = {
    "lfe": ExpertConfig("attention", RANK, RANK, FrequencyFilter("low", 0.25)),
    "hfe": ExpertConfig("feed_forward", RANK, RANK, FrequencyFilter("high", 0.25)),
}


@dataclass(frozen=True)
class BenchModel:
    """A transformer with random weights, and its input.

    Attributes:
        name: for rows.
        sizes: the transformer's sizes, as in Wan2.1's configurations.
        text: tokens of a prompt.
        latents: frames, height and width.
        dtype: dtype of the weights.
    """

    name: str
    sizes: dict[str, int]
    text: int
    latents: tuple[int, int, int]
    dtype: torch.dtype

    def transformer(self, device: torch.device) -> Any:
        """The transformer, the same on each call."""
        torch.manual_seed(0)
        with device:
            return family_named("wan").from_config("transformer", self.sizes)


def bench_model(device: torch.device) -> BenchModel:
    """The mini backbone at 17 frames of 192x192 on a CPU, Wan2.1-1.3B at 49 of 1472x2560 (2K) on a GPU."""
    if device.type != "cpu":
        return BenchModel("Wan2.1-1.3B", wan_1_3b().transformer, 512, (13, 184, 320), torch.bfloat16)
    sizes = {
        "num_attention_heads": 4, "attention_head_dim": 48, "ffn_dim": 768, "num_layers": 6, "text_dim": 64
    }  # fmt: skip
    return BenchModel("mini", sizes, 64, (5, 24, 24), torch.float32)


def measure(device: torch.device, repeats: int = 20) -> list[dict[str, Any]]:
    """Time a forward pass of the transformer with and without each expert, in turn.

    Args:
        device: a GPU runs Wan2.1-1.3B at 2K in bfloat16, a CPU the mini backbone in float32.
        repeats: rounds.

    Returns:
        One row for the base and each expert: median, least and most milliseconds, peak MiB beyond what is
        resident, and `ratio`, the median over rounds of its time to the base's in the same round.
    """
    size = bench_model(device)
    denoiser = _denoiser(size, device)
    transformer = denoiser.module
    latents = torch.randn(1, denoiser.channels, *size.latents, device=device, dtype=size.dtype)
    timestep = torch.tensor([900.0], device=device)
    text = torch.randn(1, size.text, denoiser.text_dim, device=device, dtype=size.dtype)
    times: dict[str, list[float]] = {name: [] for name in ("base", *EXPERTS)}
    peaks = {}

    def forward() -> None:
        denoiser.velocity(latents, timestep, text)

    with torch.inference_mode():
        activate(transformer, None)
        forward()
        for repeat in range(-1, repeats):
            for name, measured in times.items():
                activate(transformer, None if name == "base" else name)
                if repeat < 0:
                    peaks[name] = measure_peak_mib(forward, device)
                else:
                    measured.append(measure_ms(forward, device)[1])
    return [
        {
            "subject": "experts",
            "model": size.name,
            "latents": list(size.latents),
            "dtype": str(size.dtype).removeprefix("torch."),
            "expert": name,
            "rank": None if name == "base" else RANK,
            "ms": round(statistics.median(measured), 3),
            "ms_min": round(min(measured), 3),
            "ms_max": round(max(measured), 3),
            "peak_mib": round(peaks[name], 1),
            "ratio": round(statistics.median(t / b for t, b in zip(measured, times["base"], strict=True)), 4),
        }
        for name, measured in times.items()
    ]


def _denoiser(size: BenchModel, device: torch.device) -> Denoiser:
    transformer = size.transformer(device).eval()
    cast_weights(transformer, size.dtype)
    for name, config in EXPERTS.items():
        add_expert(transformer, name, config)
        randomize_expert(transformer, name)
    return denoiser_of(transformer)


def randomize_expert(transformer: Any, name: str, std: float = 0.02) -> None:
    """Draw an expert's weights: B starts at zero, and fast kernels must not be timed on zeros."""
    for parameter in expert_parameters(transformer, name):
        torch.nn.init.normal_(parameter, std=std)
