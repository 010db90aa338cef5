"""`luve bench --subject generate`: the cascade's stages with random weights, measured beside what `luve plan` says."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from luve_lightning.analysis.benchmarks.experts import EXPERTS, attention_name, attention_named, randomize_expert
from luve_lightning.analysis.cost import gpu_speed, named_speed
from luve_lightning.analysis.dry_run import CUBLAS_WORKSPACE
from luve_lightning.analysis.model_parts import PartConfigs, Parts, StepProgram, decode, encode_prompt, wan_1_3b
from luve_lightning.analysis.planner import Planner, StagePlan
from luve_lightning.cascade.options import CascadeOptions
from luve_lightning.cascade.speed import SpeedOptions
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.machine import measure_ms, measure_peak_mib
from luve_lightning.models.attention import Attention
from luve_lightning.models.backbones import denoiser_of
from luve_lightning.models.experts import add_expert, expert_names

STEPS, SKIP = 50, 10
BUDGET = 10.0  # seconds for a row's repetitions
BANDS = {"lfe": SigmaBand(0.875, 1.0), "hfe": SigmaBand(0.0, 0.875)}
_MIB = 2**20


@dataclass(frozen=True)
class Setup:
    """The benchmark for one kind of device.

    Attributes:
        name: name of the models.
        configs: the models.
        sizes: frames, height and width in pixels, by name.
        tile: tile of tiled decoding, in latents.
        dtype: dtype of the transformer and the text encoder.
    """

    name: str
    configs: PartConfigs
    sizes: dict[str, Size3d]
    tile: tuple[int, int]
    dtype: torch.dtype


def wan() -> Setup:
    """Wan2.1-1.3B and the base VLUer at the paper's sizes."""
    sizes = {"720p": (49, 720, 1280), "2k": (49, 1472, 2560), "4k": (49, 2176, 3840)}
    return Setup("Wan2.1-1.3B", wan_1_3b(), sizes, (64, 64), torch.bfloat16)


def mini() -> Setup:
    """Small models in which everything happens that happens to the large ones."""
    configs = PartConfigs(
        transformer={
            "num_attention_heads": 4,
            "attention_head_dim": 48,
            "ffn_dim": 512,
            "num_layers": 2,
            "text_dim": 64,
            "freq_dim": 64,
        },
        vae={"base_dim": 8, "num_res_blocks": 1},
        text_encoder={"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
        vluer={"channels": 16, "pairs": 1, "hidden": 32, "query_channels": 16, "decoder_layers": 1},
        text_length=64,
    )
    sizes = {"720p": (5, 32, 32), "2k": (5, 64, 64), "4k": (5, 96, 96)}
    return Setup("mini", configs, sizes, (6, 6), torch.float32)


def measure(
    device: torch.device,
    repeats: int = 3,
    sizes: str = "720p,2k,4k",
    vae_dtype: Literal["float32", "bfloat16"] = "float32",
    attention: str = "own",
    compile: bool = False,
    gpu: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Measure each stage of the cascade, only its own model on the device, beside what `luve plan` says.

    Args:
        device: a GPU runs Wan2.1-1.3B in bfloat16, a CPU small models in float32.
        repeats: timed runs of each stage after the first, as many as fit into 10 seconds; the median counts. What
            takes longer (a step at 2K or 4K) runs once.
        sizes: some of 720p (text, motion, decoding), 2k and 4k (upsampling, refinement by each expert, decoding),
            separated by commas.
        vae_dtype: dtype of the VAE and the VLUer.
        attention: replaces self-attention in the third stage: the beginning of a name of `--subject attention`, such
            as windows or tiles, or a record such as '{"name": "Windows", "cuts": [[1, 4, 4]]}'.
        compile: compile the transformer's blocks.
        gpu: file of `luve bench --subject speed`, for the plan's seconds; None measures two rates.

    Returns:
        Rows with the seconds of one call (a denoising step with guidance is two forward passes), `peak_mib` of
        everything allocated including weights, the plan's estimates, and their errors relative to the measurement.
        On a CPU memory is the process's, while the plan's is still a GPU's: for small models the error says
        nothing.

    Raises:
        ValueError: for an unknown size.
    """
    setup = mini() if device.type == "cpu" else wan()
    wanted = sizes.split(",")
    unknown = [size for size in wanted if size not in setup.sizes]
    if unknown:
        raise ValueError(f"sizes: expected some of {', '.join(setup.sizes)}, got {', '.join(unknown)}")
    attention_named(attention, "2k")  # refused before anything runs
    bench = _Bench(setup, device, repeats, getattr(torch, vae_dtype), attention, compile, gpu)
    for size in wanted:
        yield from bench.first_stage(size) if size == "720p" else bench.later_stages(size)


class _Bench:
    """Runs stages on real models, and plans them on models without values."""

    def __init__(
        self,
        setup: Setup,
        device: torch.device,
        repeats: int,
        vae_dtype: torch.dtype,
        attention: str = "own",
        compiles: bool = False,
        gpu: Path | None = None,
    ) -> None:
        self.setup, self.device, self.repeats = setup, device, repeats
        self.attention, self.compiles = attention, compiles
        self.parts = Parts(setup.configs, setup.dtype, device, vae_dtype)
        self.planned = Parts(setup.configs, setup.dtype, "meta", vae_dtype)
        _prepare("transformer", self.planned)
        self.speed = gpu_speed(None, None) if device.type == "cuda" else None
        if gpu is not None:
            self.speed = named_speed(str(gpu))

    def first_stage(self, size: str) -> Iterator[dict[str, Any]]:
        """Text, one step of the first stage, decoding."""
        planner = self._planner(size)
        self._only("text_encoder")
        yield self._row(size, planner.text(), partial(encode_prompt, self.parts), [])
        self._only("transformer")
        self._attend(None)
        step = StepProgram(self.parts, "motion", planner.grid, STEPS)
        yield self._row(size, planner.one_step("motion", planner.grid), step, step.tensors())
        del step
        yield from self._decoding(size)

    def later_stages(self, size: str) -> Iterator[dict[str, Any]]:
        """Upsampling, one step of refinement by each expert, decoding."""
        planner = self._planner(size)
        assert planner.low is not None
        self._only("vluer")
        low = self._latents(planner.low)
        run = partial(planner.options.method, low, planner.grid, self.parts)
        yield self._row(size, planner.upsampling(), run, [low])
        self._only("transformer")
        replaced = attention_named(self.attention, "4k" if size == "4k" else "2k")
        self._attend(replaced)
        for expert in EXPERTS:
            among = planner.steps_of("refine", planner.grid, expert)
            step = StepProgram(self.parts, "refine", planner.grid, STEPS, SKIP, among=among)
            plan = planner.one_step("refine", planner.grid, expert)
            row = self._row(size, plan, partial(step, expert), step.tensors())
            yield row | {"expert": expert, "attention": attention_name(replaced), "compiled": self.compiles}
            del step
        yield from self._decoding(size)

    def _attend(self, attention: Attention | None) -> None:
        """Replace self-attention in the transformer, and in the one that is planned."""
        for parts in (self.parts, self.planned):
            denoiser = denoiser_of(parts.transformer)
            denoiser.use_attention(attention)
            for branch in denoiser.branches.values():
                for parameter in branch.parameters():
                    torch.nn.init.normal_(parameter, std=0.02)  # it starts at zero, too
                branch.requires_grad_(False)
        if self.compiles:
            denoiser_of(self.parts.transformer).compile_blocks()

    def _decoding(self, size: str) -> Iterator[dict[str, Any]]:
        """Decoding in tiles, then whole."""
        self._only("vae")
        for tile in (self.setup.tile, None):
            planner = self._planner(size, tile)
            latents = self._latents(planner.grid)
            run = partial(decode, self.parts, latents, tile)
            row = self._row(size, planner.decoding(), run, [latents])
            yield row | {"tile": tile, "dtype": str(self.parts.vae_dtype).removeprefix("torch.")}

    def _planner(self, size: str, tile: tuple[int, int] | None = None) -> Planner:
        frames, height, width = self.setup.sizes[size]
        _, *motion = self.setup.sizes["720p"]
        options = CascadeOptions(
            height, width, frames, motion_height=motion[0], motion_width=motion[1], steps=STEPS, skip_steps=SKIP
        )
        running = SpeedOptions(decode_tile=tile, offload=True, compile=self.compiles)
        workspace = CUBLAS_WORKSPACE if self.device.type == "cuda" else 0
        return Planner(self.planned, options, running, self.speed, workspace)

    def _latents(self, grid: Size3d) -> torch.Tensor:
        # The real codec is a model on the device: asking it would put it there.
        return torch.randn(1, self.planned.codec.channels, *grid, device=self.device)

    def _only(self, part: str) -> None:
        """Put this model, and no other, on the device."""
        self.parts.forget(*(name for name in self.parts.names() if name != part))
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        _prepare(part, self.parts)

    def _row(self, size: str, plan: StagePlan, run: Callable[[], object], inputs: list[torch.Tensor]) -> dict[str, Any]:
        row = {
            "subject": "generate",
            "model": self.setup.name,
            "size": size,
            "stage": plan.stage,
            "latents": plan.latents,
            "tflop": float(f"{plan.flops / plan.forwards / 1e12:.6g}"),
            "dtype": str(self.setup.dtype).removeprefix("torch."),
            "plan_peak_mib": round(plan.peak / _MIB, 1),
            "plan_seconds": None if plan.seconds is None else round(plan.seconds / plan.forwards, 4),
        }
        try:
            seconds, peak = self._measured(run, plan, inputs)
        except torch.OutOfMemoryError as error:
            return row | {"error": str(error).partition(". ")[0]}
        errors = {"peak_error": _relative(plan.peak, peak)}
        if plan.seconds is not None:
            errors["seconds_error"] = _relative(plan.seconds / plan.forwards, seconds)
        return row | {"seconds": round(seconds, 4), "peak_mib": round(peak / _MIB, 1)} | errors

    def _measured(self, run: Callable[[], object], plan: StagePlan, inputs: list[torch.Tensor]) -> tuple[float, float]:
        """Seconds of a call, and bytes at its peak."""
        if self.compiles:
            run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        times = [_seconds(run, self.device)]
        if self.device.type == "cuda":
            peak: float = torch.cuda.max_memory_allocated(self.device)
        else:
            resident = plan.weights + sum(tensor.nbytes for tensor in inputs)
            peak = resident + measure_peak_mib(run, self.device) * _MIB
        more = min(self.repeats, int(BUDGET / times[0]))
        times = [_seconds(run, self.device) for _ in range(more)] or times
        return statistics.median(times), peak


def _prepare(part: str, parts: Parts) -> None:
    """Prepare random weights for timing."""
    module = parts.module(part)
    if part == "vluer":
        # The last convolution starts at zero; fast kernels must not be timed on zeros.
        torch.nn.init.normal_(parts.vluer.get_parameter("decoder.conv_out.weight"), std=0.02)
    if part == "transformer" and not expert_names(parts.transformer):
        for name, config in EXPERTS.items():
            add_expert(parts.transformer, name, replace(config, band=BANDS[name]))
            randomize_expert(parts.transformer, name)
    module.requires_grad_(False)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    with torch.no_grad():
        return measure_ms(run, device)[1] / 1e3


def _relative(estimate: float, measured: float) -> float:
    return round(estimate / measured - 1, 4)
