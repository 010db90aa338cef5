"""`luve bench --subject experts`: a forward pass with and without an expert, with random weights."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from luve_lightning.analysis.benchmarks.attention import kinds
from luve_lightning.analysis.model_parts import cast_weights, wan_1_3b
from luve_lightning.functional.frequency import FrequencyFilter
from luve_lightning.machine import measure_ms, measure_peak_mib
from luve_lightning.models.attention import Attention
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


Size = Literal["2k", "4k"]
_LATENTS: dict[Size, tuple[int, int, int]] = {"2k": (13, 184, 320), "4k": (13, 272, 480)}
_SMALL: dict[Size, tuple[int, int, int]] = {"2k": (5, 24, 24), "4k": (5, 34, 36)}


def bench_model(device: torch.device, size: Size = "2k") -> BenchModel:
    """The mini backbone on a CPU, Wan2.1-1.3B at 49 frames of 1472x2560 (2K) or 2176x3840 (4K) on a GPU."""
    if device.type != "cpu":
        return BenchModel("Wan2.1-1.3B", wan_1_3b().transformer, 512, _LATENTS[size], torch.bfloat16)
    sizes = {
        "num_attention_heads": 4, "attention_head_dim": 48, "ffn_dim": 768, "num_layers": 6, "text_dim": 64
    }  # fmt: skip
    return BenchModel("mini", sizes, 64, _SMALL[size], torch.float32)


def measure(
    device: torch.device,
    repeats: int = 20,
    size: Size = "2k",
    attention: str = "own",
    compile: bool = False,
    profile: Path | None = None,
) -> list[dict[str, Any]]:
    """Time a forward pass of the transformer with and without each expert, in turn.

    Args:
        device: a GPU runs Wan2.1-1.3B in bfloat16, a CPU the mini backbone in float32.
        repeats: rounds.
        size: 2k or 4k, 49 frames; on a CPU two small sizes.
        attention: replaces the transformer's own self-attention: the beginning of a name of `--subject attention`,
            such as windows or tiles, or a record such as '{"name": "Windows", "cuts": [[1, 4, 4]]}'.
        compile: compile the transformer's blocks.
        profile: file for a table of the kernels in one pass of the base.

    Returns:
        One row for the base and each expert: median, least and most milliseconds, peak MiB beyond what is
        resident, and `ratio`, the median over rounds of its time to the base's in the same round. With a replaced
        attention `attention_share` is its share of the pass.
    """
    model, replaced = bench_model(device, size), attention_named(attention, size)
    denoiser = _denoiser(model, device, replaced, compile)
    transformer = denoiser.module
    latents = torch.randn(1, denoiser.channels, *model.latents, device=device, dtype=model.dtype)
    timestep = torch.tensor([900.0], device=device)
    text = torch.randn(1, model.text, denoiser.text_dim, device=device, dtype=model.dtype)
    times: dict[str, list[float]] = {name: [] for name in ("base", *EXPERTS)}
    peaks, shares = {}, {}

    def forward() -> None:
        denoiser.velocity(latents, timestep, text)

    with torch.inference_mode():
        for name in reversed(times):  # the base is the last, as in the rounds
            activate(transformer, None if name == "base" else name)
            if compile or name == "base":
                forward()
        if profile is not None:
            write_profile(forward, device, profile)
        for repeat in range(-1, repeats):
            for name, measured in times.items():
                activate(transformer, None if name == "base" else name)
                if repeat < 0:
                    peaks[name] = measure_peak_mib(forward, device)
                    shares[name] = attention_share(denoiser, forward, device)
                else:
                    measured.append(measure_ms(forward, device)[1])
    return [
        {
            "subject": "experts",
            "model": model.name,
            "size": size,
            "latents": list(model.latents),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": attention_name(replaced),
            "compile": compile,
            "expert": name,
            "rank": None if name == "base" else RANK,
            "ms": round(statistics.median(measured), 3),
            "ms_min": round(min(measured), 3),
            "ms_max": round(max(measured), 3),
            "attention_share": shares[name],
            "peak_mib": round(peaks[name], 1),
            "ratio": round(statistics.median(t / b for t, b in zip(measured, times["base"], strict=True)), 4),
        }
        for name, measured in times.items()
    ]


def attention_named(name: str, size: Size) -> Attention | None:
    """The attention that an option names; None is the transformer's own.

    Raises:
        ValueError: for an unknown one.
    """
    if name == "own":
        return None
    if name.startswith("{"):
        return Attention.from_record(json.loads(name))
    known = kinds(size)
    found = next((attention for kind, attention in known.items() if kind.startswith(name)), None)
    if found is None:
        raise ValueError(f"attention {name!r}: expected own, a record, or the beginning of {'; '.join(known)}")
    return found


def attention_name(attention: Attention | None) -> str:
    """An attention in a row: "own", or the class with its settings."""
    return "own" if attention is None else str(attention)


def attention_share(denoiser: Denoiser, forward: Callable[[], object], device: torch.device) -> float | None:
    """Share of a forward pass that a replaced attention takes; None where it is not replaced."""
    attention = denoiser.attention
    if attention is None:
        return None
    waits: list[Callable[[], float]] = []

    def timed(*args: Any) -> Tensor:
        begin = _mark(device)
        output = attention(*args)
        end = _mark(device)
        waits.append(lambda: _elapsed(begin, end))
        return output

    denoiser.set_attention(timed)
    try:
        _, whole = measure_ms(forward, device)
        return round(sum(wait() for wait in waits) / whole, 3)
    finally:
        denoiser.set_attention(attention)


def _mark(device: torch.device) -> Any:
    """Now, on the device."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(begin: Any, end: Any) -> float:
    """Milliseconds between two marks."""
    return float((end - begin) * 1e3 if isinstance(begin, float) else begin.elapsed_time(end))


def write_profile(run: Callable[[], object], device: torch.device, file: Path, rows: int = 25) -> None:
    """Run once under torch.profiler, and write a table of the kernels (on a CPU: operators) that took most time."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=kinds, acc_events=True) as found:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    averages = found.key_averages()
    events: Any = [event for event in averages if device.type != "cuda" or event.device_type.name == "CUDA"]
    total = sum(getattr(event, order) for event in events)
    lines = [f"{total / 1e3:.1f} ms in all", "      ms  share  calls  name"]
    for event in sorted(events, key=lambda event: -getattr(event, order))[:rows]:
        took = getattr(event, order)
        lines.append(f"{took / 1e3:8.1f} {took / total:6.1%} {event.count:6}  {event.key[:110]}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _denoiser(model: BenchModel, device: torch.device, attention: Attention | None, compile: bool) -> Denoiser:
    transformer = model.transformer(device).eval()
    cast_weights(transformer, model.dtype)
    denoiser = denoiser_of(transformer)
    if attention is not None:
        denoiser.use_attention(attention)
    for name, config in EXPERTS.items():
        add_expert(transformer, name, config)
        randomize_expert(transformer, name)
    if compile:
        denoiser.compile_blocks()
    return denoiser


def randomize_expert(transformer: Any, name: str, std: float = 0.02) -> None:
    """Draw an expert's weights: B starts at zero, and fast kernels must not be timed on zeros."""
    for parameter in expert_parameters(transformer, name):
        torch.nn.init.normal_(parameter, std=std)
