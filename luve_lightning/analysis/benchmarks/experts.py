"""`luve bench --subject experts`: what a forward pass costs with an expert and without, with random weights."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from luve_lightning.analysis.cost import measure_ms, measure_peak_mib
from luve_lightning.functional.frequency import FrequencyFilter
from luve_lightning.models.experts import ExpertConfig, activate, add_expert, expert_parameters

RANK = 32
EXPERTS = {
    "lfe": ExpertConfig("attention", RANK, RANK, FrequencyFilter("low", 0.25)),
    "hfe": ExpertConfig("feed_forward", RANK, RANK, FrequencyFilter("high", 0.25)),
}


@dataclass(frozen=True)
class _Model:
    """A transformer's size and what it is run on; `latents` are frames, height, width."""

    name: str
    heads: int
    head_dim: int
    ffn_dim: int
    layers: int
    text: tuple[int, int]
    latents: tuple[int, int, int]
    dtype: torch.dtype


# 17 frames of 192x192 and 49 of 1472x2560 (2K).
_MINI = _Model("mini", 4, 48, 512, 6, (32, 64), (5, 24, 24), torch.float32)
_WAN = _Model("Wan2.1-1.3B", 12, 128, 8960, 30, (512, 4096), (13, 184, 320), torch.bfloat16)


def measure(device: torch.device, repeats: int = 20) -> list[dict[str, Any]]:
    """Time a forward pass of the transformer with and without each expert, in turn.

    Args:
        device: a GPU runs Wan2.1-1.3B at 2K in bfloat16, a CPU the mini backbone in float32.
        repeats: rounds.

    Returns:
        One row for the base and each expert: median, least and most milliseconds, peak MiB beside what is resident,
        and `ratio`, the median over rounds of its time to the base's of the same round.
    """
    size = _MINI if device.type == "cpu" else _WAN
    transformer, arguments = _transformer(size, device), _arguments(size, device)
    times: dict[str, list[float]] = {name: [] for name in ("base", *EXPERTS)}
    peaks = {}

    def forward() -> None:
        transformer(**arguments)

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


def _transformer(size: _Model, device: torch.device) -> WanTransformer3DModel:
    torch.manual_seed(0)
    with device:
        transformer = WanTransformer3DModel(
            num_attention_heads=size.heads,
            attention_head_dim=size.head_dim,
            ffn_dim=size.ffn_dim,
            num_layers=size.layers,
            text_dim=size.text[1],
        ).eval()
    for name, parameter in transformer.named_parameters():
        # What from_pretrained(torch_dtype=...) does.
        if not any(kept in name for kept in transformer._keep_in_fp32_modules):
            parameter.data = parameter.data.to(size.dtype)
    for name, config in EXPERTS.items():
        add_expert(transformer, name, config)
        for parameter in expert_parameters(transformer, name):
            # B starts at zero; fast kernels must not be timed on zeros.
            torch.nn.init.normal_(parameter, std=0.02)
    return transformer


def _arguments(size: _Model, device: torch.device) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": torch.randn(1, 16, *size.latents, device=device, dtype=size.dtype),
        "timestep": torch.tensor([900.0], device=device),
        "encoder_hidden_states": torch.randn(1, *size.text, device=device, dtype=size.dtype),
    }
