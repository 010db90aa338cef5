"""The pre-flight plan: what making one video takes, from configuration files, before anything runs.

A stage's peak memory is the weights on the device, what the stage's own code allocates (`dry_run`), and
workspaces. In a denoising stage the peak is inside a block's feed-forward. With d the transformer's width and f
the feed-forward's, a token then holds the block's input, its sum with both attentions, the cross-attention's
output and the normed input (4 d), the feed-forward's hidden state before and after its activation (2 f), all in
the model's dtype, and two rotary factors of a head's width in float32: for Wan2.1-1.3B in bfloat16 2 * (4 * 1536 +
2 * 8960) + 2 * 4 * 128 = 49,152 bytes. At 2K with 49 frames (191,360 tokens) a forward pass comes to 8971 MiB;
8973 MiB were measured on one H200. Attention over n tokens needs no n x n matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from luve_lightning.analysis.cost import GpuSpeed
from luve_lightning.analysis.dry_run import CUBLAS_WORKSPACE, DryRun, dry_run, weight_bytes
from luve_lightning.analysis.model_parts import DenoisingStage, Parts, StepProgram, decode, encode_prompt
from luve_lightning.cascade.denoise import expert_chooser
from luve_lightning.cascade.options import CascadeOptions, Guidance
from luve_lightning.cascade.speed import SpeedOptions
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.models.backbones import denoiser_of
from luve_lightning.models.experts import expert_names


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes. Memory is in bytes.

    Attributes:
        stage: "text", "motion" (or "direct"), "upsample", "refine", "decode".
        latents: frames, height and width of its result, or of what it decodes; None for text.
        tokens: tokens in one forward pass of the transformer.
        steps: number of denoising steps.
        forwards: number of passes of the transformer, or of the text encoder.
        flops_per_forward: floating-point operations of one pass.
        flops: floating-point operations of the stage.
        weights: weights on the device.
        activations: the stage's own allocations at its peak.
        workspace: workspace of cuBLAS and, where they count, of attention and convolutions.
        peak: sum of the three.
        terms: what makes up the activations, the largest first.
        experts: denoising steps by expert; "none" where the transformer runs alone.
        seconds: estimated duration; None without a GPU's speed.
    """

    stage: str
    latents: Size3d | None
    tokens: int | None
    steps: int
    forwards: int
    flops_per_forward: int
    flops: int
    weights: int
    activations: int
    workspace: int
    peak: int
    terms: dict[str, int]
    experts: dict[str, int] = field(default_factory=dict)
    seconds: float | None = None


class Planner:
    """Plans the stages of one cascade.

    Args:
        parts: the cascade's models, on the meta device.
        options: options of the video, with every size given.
        running: its `decode_tile` and `offload` are planned.
        speed: speed of the GPU, for estimates of time.
        cublas: bytes of cuBLAS's workspace; 0 for a CPU.
    """

    def __init__(
        self,
        parts: Parts,
        options: CascadeOptions,
        running: SpeedOptions | None = None,
        speed: GpuSpeed | None = None,
        cublas: int = CUBLAS_WORKSPACE,
    ) -> None:
        self.parts, self.options, self.speed, self.cublas = parts, options, speed, cublas
        self.running = running or SpeedOptions()
        codec = parts.codec
        self.grid = codec.latent_size(*options.size)
        denoiser_of(parts.refiner).token_grid(self.grid)
        self.low: Size3d | None = None
        if options.cascade:
            self.low = codec.latent_size(*options.motion)
            denoiser_of(parts.transformer).token_grid(self.low)

    def stages(self) -> list[StagePlan]:
        """Every stage in order."""
        planned = [self.text()]
        if self.low is None:
            return [*planned, self.denoising("motion", self.grid, name="direct"), self.decoding()]
        planned += [self.denoising("motion", self.low), self.upsampling()]
        if self.options.skip_steps < self.options.steps:
            planned.append(self.denoising("refine", self.grid))
        return [*planned, self.decoding()]

    def text(self) -> StagePlan:
        """Encoding the prompt, and the negative prompt unless nothing is guided."""
        run = self._dry("text_encoder", lambda _: encode_prompt(self.parts))
        guided = self.options.guidance.scale > 1 or self.options.refining.scale > 1
        return self._stage("text", ["text_encoder"], run, forwards=2 if guided else 1)

    def denoising(self, stage: DenoisingStage, grid: Size3d, name: str | None = None) -> StagePlan:
        """The denoising steps of a stage."""
        parts, steps = self.parts, self.options.steps
        guidance = self._guidance(stage)
        model = parts.transformer if stage == "motion" else parts.refiner
        used = "transformer" if model is parts.transformer else "refiner"
        skip = self.options.skip_steps if stage == "refine" else 0
        chosen: dict[str | None, int] = {None: steps}
        if stage == "refine" or not self.options.cascade:
            chosen = self._experts_by_step(model, skip)
        runs = {expert: self._step(stage, used, grid, skip, expert) for expert in chosen}
        sigmas = [sigma for _, sigma in parts.configs.schedule.steps(steps)[skip:]]
        guided = sum(map(guidance.at, sigmas))
        predictions = len(sigmas) + guided
        in_one = 2 if guided else 1  # predictions of the step that was run dry
        share = {expert: count / len(sigmas) for expert, count in chosen.items()}
        seconds = None
        if self.speed is not None:
            one = sum(self.speed.seconds(runs[expert].operations) * share[expert] for expert in runs) / in_one
            seconds = one * predictions
        t, h, w = denoiser_of(model).token_grid(grid)
        return self._stage(
            name or stage,
            [used],
            max(runs.values(), key=lambda run: run.peak),
            latents=grid,
            tokens=t * h * w,
            steps=len(sigmas),
            forwards=len(sigmas) if guidance.batched else predictions,
            flops=round(sum(runs[expert].flops * share[expert] for expert in runs) / in_one * predictions),
            experts={str(expert or "none"): count for expert, count in chosen.items()},
            seconds=seconds,
        )

    def one_step(self, stage: DenoisingStage, grid: Size3d, expert: str | None = None) -> StagePlan:
        """A single denoising step, a guided one if any is."""
        own = stage == "refine" and self.parts.configs.refiner is not None
        used = "refiner" if own else "transformer"
        skip = self.options.skip_steps if stage == "refine" else 0
        run = self._step(stage, used, grid, skip, expert)
        return self._stage(stage, [used], run, latents=grid, steps=1, experts={str(expert or "none"): 1})

    def _step(self, stage: DenoisingStage, used: str, grid: Size3d, skip: int, expert: str | None) -> DryRun:
        guidance, steps = self._guidance(stage), self.options.steps
        return self._dry(used, lambda _: StepProgram(self.parts, stage, grid, steps, skip, guidance)(expert))

    def _guidance(self, stage: DenoisingStage) -> Guidance:
        return self.options.refining if stage == "refine" else self.options.guidance

    def upsampling(self) -> StagePlan:
        """From the first stage's latents to the video's."""
        method, low = self.options.method, self.low
        assert low is not None
        used: list[str] = [] if method.model is None else [method.model]
        shape = (1, self.parts.codec.channels, *low)
        run = self._dry(used, lambda _: method(torch.empty(shape, device="meta"), self.grid, self.parts))
        return self._stage("upsample", used, run, latents=self.grid)

    def decoding(self) -> StagePlan:
        """From latents to the video's pixels, float32 on the GPU."""
        codec, tile = self.parts.codec, self.running.decode_tile

        def program(run: DryRun) -> object:
            latents = torch.empty(1, codec.channels, *self.grid, device="meta")
            if tile is None:
                return decode(self.parts, latents, None)
            codec.dry_decode_in_tiles(latents, tile, run.times)
            return None

        return self._stage("decode", ["vae"], self._dry("vae", program), latents=self.grid)

    def _experts_by_step(self, model: Any, skip: int) -> dict[str | None, int]:
        """Number of steps per expert, as the scheduler's timesteps route them."""
        choose = expert_chooser(model) if expert_names(model) else None
        counts: dict[str | None, int] = {}
        for timestep, _ in self.parts.configs.schedule.steps(self.options.steps)[skip:]:
            expert = None if choose is None else choose(timestep)
            counts[expert] = counts.get(expert, 0) + 1
        return counts

    def _dry(self, used: str | Iterable[str], program: Callable[[DryRun], object]) -> DryRun:
        for name in [used] if isinstance(used, str) else used:
            self.parts.module(name)  # made before its stage, not in it
        with dry_run() as run:
            program(run)
        return run

    def _stage(
        self,
        name: str,
        used: list[str],
        run: DryRun,
        *,
        latents: Size3d | None = None,
        tokens: int | None = None,
        steps: int = 0,
        forwards: int = 1,
        flops: int | None = None,
        experts: dict[str, int] | None = None,
        seconds: float | None = None,
    ) -> StagePlan:
        resident = used if self.running.offload else self.parts.names()
        weights = sum(weight_bytes(self.parts.module(part)) for part in resident)
        workspace = run.terms.get("workspace", 0)
        activations = run.peak - workspace
        workspace += self.cublas
        flops = run.flops * forwards if flops is None else flops
        if seconds is None and self.speed is not None:
            seconds = self.speed.seconds(run.operations) * forwards
        return StagePlan(
            stage=name,
            latents=latents,
            tokens=tokens,
            steps=steps,
            forwards=forwards,
            flops_per_forward=round(flops / forwards),
            flops=flops,
            weights=weights,
            activations=activations,
            workspace=workspace,
            peak=weights + activations + workspace,
            terms={term: size for term, size in run.terms.items() if term != "workspace"},
            experts=experts or {},
            seconds=seconds,
        )


_GIB = 2**30
_TERMS = 3


def plan_dict(options: CascadeOptions, stages: Sequence[StagePlan], speed: GpuSpeed | None) -> dict[str, Any]:
    """The whole plan in plain types."""
    seconds = None if speed is None else sum(stage.seconds or 0.0 for stage in stages)
    return {
        "frames_height_width": list(options.size),
        "motion_frames_height_width": list(options.motion) if options.cascade else None,
        "steps": options.steps,
        "skip_steps": options.skip_steps,
        "peak": max(stage.peak for stage in stages),
        "flops": sum(stage.flops for stage in stages),
        "seconds": seconds,
        "gpu": None if speed is None else speed.name,
        "stages": [asdict(stage) for stage in stages],
    }


def plan_text(stages: Sequence[StagePlan], speed: GpuSpeed | None) -> str:
    """A table of the stages, then what makes up their memory, and the totals."""
    head = ["stage", "latents", "tokens", "steps", "forwards", "TFLOP each", "TFLOP", "peak GiB", "estimated"]
    rows = [head if speed else head[:-1]]
    for stage in stages:
        row = [
            stage.stage,
            "" if stage.latents is None else "x".join(map(str, stage.latents)),
            "" if stage.tokens is None else f"{stage.tokens:,}",
            str(stage.steps or ""),
            str(stage.forwards),
            _three(stage.flops_per_forward / 1e12),
            _three(stage.flops / 1e12),
            f"{stage.peak / _GIB:.2f}",
        ]
        rows.append(row if speed is None else [*row, duration(stage.seconds or 0.0)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(n) if i < 2 else cell.rjust(n) for i, (cell, n) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines += ["", "memory, GiB: weights + activations + workspace (the largest activations)"]
    lines += [f"  {stage.stage.ljust(widths[0])}  {_memory(stage)}" for stage in stages]
    lines += ["", *_conclusion(stages, speed)]
    return "\n".join(line.rstrip() for line in lines)


def duration(seconds: float) -> str:
    """A duration, short enough for a table."""
    if seconds < 100:
        return f"{_three(seconds)} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _memory(stage: StagePlan) -> str:
    parts = " + ".join(f"{n / _GIB:.2f}" for n in (stage.weights, stage.activations, stage.workspace))
    largest = [
        f"{'.'.join(path.split('.')[-3:])} {size / _GIB:.2f}" for path, size in list(stage.terms.items())[:_TERMS]
    ]
    experts = ", ".join(f"{count} steps {name}" for name, count in stage.experts.items() if name != "none")
    return f"{parts} ({', '.join(largest)})" + (f"; experts: {experts}" if experts else "")


def _conclusion(stages: Sequence[StagePlan], speed: GpuSpeed | None) -> list[str]:
    highest = max(stages, key=lambda stage: stage.peak)
    peak = highest.peak / _GIB
    lines = [f"peak {peak:.2f} GiB in {highest.stage}, {_three(sum(s.flops for s in stages) / 1e12)} TFLOP in all"]
    if speed is None:
        return [*lines, "no time estimate: give --gpu h200, or your GPU's speed with --gpu_tflops"]
    total = sum(stage.seconds or 0.0 for stage in stages)
    fits = "fits" if peak < speed.memory_gib else "does not fit"
    lines.append(
        f"estimated time {duration(total)} on one {speed.name}, without loading; {fits} its {speed.memory_gib:g} GiB"
    )
    return lines


def _three(number: float) -> str:
    """A number with three significant digits, without an exponent."""
    if number == 0:
        return "0"
    if number >= 1000:
        return f"{number:,.0f}"
    if number < 1e-4:
        return "< 0.0001"
    return f"{number:.3g}"
