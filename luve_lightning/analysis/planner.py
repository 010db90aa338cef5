"""The pre-flight plan: what making one video takes, from configuration files, before anything runs.

A stage's peak memory is the weights on the device, what the stage's own code allocates (`dry_run`), and workspaces.
What an attention costs may depend on the noise level, so denoising steps are grouped by it. In a denoising stage the
peak is inside a block's feed-forward. With d the transformer's width and f the feed-forward's, a token then holds the
block's input, its sum with both attentions, the cross-attention's output and the normed input (4 d), the feed-
forward's hidden state before and after its activation (2 f), all in the model's dtype, and two rotary factors of a
head's width in float32: for Wan2.1-1.3B in bfloat16 2 * (4 * 1536 + 2 * 8960) + 2 * 4 * 128 = 49,152 bytes. At 2K with
49 frames (191,360 tokens) a forward pass comes to 8971 MiB; 8973 MiB were measured on one H200. Attention over n
tokens needs no n x n matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch

from luve_lightning.analysis.cost import FirstUse, GpuSpeed, counting_attention, total
from luve_lightning.analysis.dry_run import CUBLAS_WORKSPACE, DryRun, dry_run, weight_bytes
from luve_lightning.analysis.model_parts import DenoisingStage, Parts, StepProgram, decode, encode_prompt
from luve_lightning.cascade.expert_choice import expert_chooser
from luve_lightning.cascade.options import CascadeOptions, Guidance
from luve_lightning.cascade.refinement import RefiningSteps
from luve_lightning.cascade.speed import SpeedOptions
from luve_lightning.functional.frequency import Grid
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.functional.noise_bands import sigma_of_timestep
from luve_lightning.models.attention import Attention
from luve_lightning.models.backbones import Denoiser, denoiser_of
from luve_lightning.models.experts import expert_names

DENSE = "dense"


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
        attention: denoising steps by self-attention: "dense", or the name of what replaces it.
        pairs: query-key products of self-attention in all forward passes, as a share of those of dense attention.
        seconds: estimated duration; None without a GPU's speed, or where it lacks the rate of an operation.
        first_use_seconds: what the first video of a process takes longer: compiling the transformer's blocks, a graph
            for each expert (and batch) in force, and building the kernels that decode. None where that is not known.
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
    attention: dict[str, int] = field(default_factory=dict)
    pairs: float | None = None
    seconds: float | None = None
    first_use_seconds: float | None = 0.0


class Planner:
    """Plans the stages of one cascade.

    Args:
        parts: the cascade's models, on the meta device.
        options: options of the video, with every size given.
        running: its `decode_tile`, `decode_half`, `offload` and `compile` are planned.
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
            planned.append(self.denoising("motion", self.grid, name="direct"))
        else:
            planned += [self.denoising("motion", self.low), self.upsampling()]
            if parts := self.options.refined_by.planned(self.low, self.grid, self.options.steps, self._skip("refine")):
                planned.append(self.denoising("refine", self.grid, parts=parts))
        return [*planned, self._after(planned, self.decoding())]

    @staticmethod
    def _after(planned: Iterable[StagePlan], decoding: StagePlan) -> StagePlan:
        """Decoding whose kernels are built while the stages before it run."""
        building, before = decoding.first_use_seconds, total(stage.seconds for stage in planned)
        rest = None if building is None or before is None else max(0.0, building - before)
        return replace(decoding, first_use_seconds=rest if building != 0 else 0.0)

    def text(self) -> StagePlan:
        """Encoding the prompt, and the negative prompt unless nothing is guided."""
        run = self._dry("text_encoder", lambda _: encode_prompt(self.parts))
        guided = self.options.guidance.scale > 1 or self.options.refining.scale > 1
        return self._stage("text", ["text_encoder"], run, forwards=2 if guided else 1)

    def denoising(
        self, stage: DenoisingStage, grid: Size3d, name: str | None = None, parts: Sequence[RefiningSteps] = ()
    ) -> StagePlan:
        """The denoising steps of a stage; of `parts`, where its forward passes are not all of the stage's size."""
        guidance = self._guidance(stage)
        model = self.parts.transformer if stage == "motion" else self.parts.refiner
        parts = parts or [self._whole(stage, grid)]
        found = [(part, group) for part in parts for group in self._groups(stage, part)]
        groups = [group for _, group in found]
        runs = [self._step(stage, part, group.expert, group.steps) for part, group in found]
        counts = [len(group.steps) * part.passes for part, group in found]
        predictions = [count * (1 + group.guided) for count, group in zip(counts, groups, strict=True)]
        seconds = [None if self.speed is None else self.speed.seconds(run.operations) for run in runs]
        experts: Counter[str] = Counter()
        attention: Counter[str] = Counter()
        for part, group in found:
            count = 0 if part.further else len(group.steps)
            experts[str(group.expert or "none")] += count
            attention[DENSE if group.dense else type(denoiser_of(model).attention).__name__] += count
        graphs = {(group.expert, guidance.batched and group.guided, part.grid) for part, group in found}
        uses: list[FirstUse] = ["forward" for _ in graphs] if self.running.compile else []
        if uses and stage == "motion":  # which starts the compiler
            uses.append("compiler")
        tokens = [prod(denoiser_of(model).token_grid(part.grid)) for part, _ in found]
        shares = (sum(group.pairs) / len(group.pairs) / n**2 for n, group in zip(tokens, groups, strict=True))
        return self._stage(
            name or stage,
            [self._used(stage)],
            max(runs, key=lambda run: run.peak),
            latents=grid,
            tokens=max(tokens),
            steps=experts.total(),
            forwards=sum(counts) if guidance.batched else sum(predictions),
            flops=sum(run.flops * count for run, count in zip(runs, counts, strict=True)),
            experts=dict(experts),
            attention=dict(attention),
            pairs=sum(share * n for share, n in zip(shares, predictions, strict=True)) / sum(predictions),
            seconds=total(None if s is None else s * count for s, count in zip(seconds, counts, strict=True)),
            uses=uses,
        )

    def steps_of(self, stage: DenoisingStage, grid: Size3d, expert: str | None) -> tuple[int, ...] | None:
        """Places in the schedule of the steps that an expert takes; None where it takes none of its own."""
        groups = self._groups(stage, self._whole(stage, grid))
        return tuple(i for group in groups if group.expert == expert for i in group.steps) or None

    def one_step(self, stage: DenoisingStage, grid: Size3d, expert: str | None = None) -> StagePlan:
        """A single denoising step, a guided one if any is, among those that the expert takes."""
        run = self._step(stage, self._whole(stage, grid), expert, self.steps_of(stage, grid, expert))
        return self._stage(stage, [self._used(stage)], run, latents=grid, steps=1, experts={str(expert or "none"): 1})

    def forward_passes(self) -> list[StagePlan]:
        """One pass of the last stage's transformer at full size: with dense attention, and with what replaces it."""
        stage: DenoisingStage = "refine" if self.options.cascade else "motion"
        used = self._used(stage)
        denoiser = denoiser_of(self.parts.module(used))
        t, h, w = denoiser.token_grid(self.grid)
        shape = (1, self.parts.configs.text_length, denoiser.text_dim)

        def program(_: DryRun) -> object:
            latents = torch.empty(1, denoiser.channels, *self.grid, device="meta", dtype=denoiser.dtype)
            text = torch.empty(shape, device="meta", dtype=denoiser.dtype)
            beside = torch.empty_like(latents) if denoiser.conditioned else None
            return denoiser.velocity(latents, torch.empty(1, device="meta"), text, sigmas=(0.0,), condition=beside)

        own, found = denoiser.attention, []
        for attention in dict.fromkeys((None, own)):
            denoiser.use_attention(attention)
            pairs = pairs_by_block(attention, (t, h, w), len(denoiser.blocks), 0.0)
            found.append(
                self._stage(
                    "forward",
                    [used],
                    self._dry(used, program, denoiser),
                    latents=self.grid,
                    tokens=t * h * w,
                    attention={DENSE if is_dense(pairs, (t, h, w)) else type(attention).__name__: 1},
                    pairs=sum(pairs) / len(pairs) / (t * h * w) ** 2,
                )
            )
        return found

    def _whole(self, stage: DenoisingStage, grid: Size3d) -> RefiningSteps:
        return RefiningSteps(grid, self.options.steps, self._skip(stage))

    def _groups(self, stage: DenoisingStage, part: RefiningSteps) -> list[StepGroup]:
        routed, guidance = stage == "refine" or not self.options.cascade, self._guidance(stage)
        # A switch for each video is known afterwards only.
        switch = None if isinstance(self.options.switch, str) else self.options.switch
        return step_groups(self.parts, stage, part, guidance, routed, switch)

    def _skip(self, stage: DenoisingStage) -> int:
        return self.options.skip_steps if stage == "refine" else 0

    def _step(
        self, stage: DenoisingStage, part: RefiningSteps, expert: str | None, among: Collection[int] | None
    ) -> DryRun:
        guidance = self._guidance(stage)
        denoiser = denoiser_of(self.parts.module(self._used(stage)))

        def program(_: DryRun) -> object:
            return StepProgram(self.parts, stage, part.grid, part.steps, part.skip, guidance, among)(expert)

        return self._dry(self._used(stage), program, denoiser)

    def _used(self, stage: DenoisingStage) -> str:
        return "refiner" if stage == "refine" and self.parts.configs.refiner is not None else "transformer"

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
        """From latents to the video's pixels: float32 on the GPU, unless they leave it part by part.

        Its first use is all of building its kernels.
        """
        parts, tile = self.parts, self.running.decode_tile
        if self.running.decode_half and tile is None:
            parts = Parts(parts.configs, parts.dtype, parts.device, torch.bfloat16)
        codec = parts.codec
        shape, size = (1, codec.channels, *self.grid), (1, 3, *codec.pixel_size(*self.grid))
        # Made before the dry run, `out` is not counted there.
        elsewhere = tile is None and codec.streams(torch.empty(shape, device="meta"))
        out = torch.empty(size, device="meta") if elsewhere else None

        def program(run: DryRun) -> object:
            latents = torch.empty(shape, device="meta")
            if tile is None:
                return decode(parts, latents, None, out)
            codec.dry_decode_in_tiles(latents, tile, run.times)
            return None

        uses: list[FirstUse] = ["kernels"] if elsewhere else []
        return self._stage("decode", ["vae"], self._dry("vae", program), latents=self.grid, uses=uses)

    def _dry(
        self, used: str | Iterable[str], program: Callable[[DryRun], object], denoiser: Denoiser | None = None
    ) -> DryRun:
        for name in [used] if isinstance(used, str) else used:
            self.parts.module(name)  # made before its stage, not in it
        if denoiser is None:
            with dry_run() as run:
                program(run)
            return run
        compiled = [block for _, block in denoiser.blocks] if self.running.compile else []
        with dry_run(compiled=compiled) as run, counting_attention(denoiser, run):
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
        attention: dict[str, int] | None = None,
        pairs: float | None = None,
        seconds: float | None = None,
        uses: Collection[FirstUse] = (),
    ) -> StagePlan:
        resident = used if self.running.offload else self.parts.names()
        weights = sum(weight_bytes(self.parts.module(part)) for part in resident)
        workspace = run.terms.get("workspace", 0)
        activations = run.peak - workspace
        workspace += self.cublas
        flops = run.flops * forwards if flops is None else flops
        if seconds is None and self.speed is not None:
            seconds = total([self.speed.seconds(run.operations)] * forwards)
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
            attention=attention or {},
            pairs=pairs,
            seconds=seconds,
            first_use_seconds=self.speed.first_uses(uses) if self.speed is not None else (None if uses else 0.0),
        )


@dataclass(frozen=True)
class StepGroup:
    """Steps that cost the same.

    Attributes:
        expert: the active expert, or None.
        pairs: query-key products of one head and sample, by block.
        dense: whether these are all pairs of tokens in every block.
        guided: whether each step has two predictions.
        steps: places in the schedule, skipped steps included.
    """

    expert: str | None
    pairs: tuple[int, ...]
    dense: bool
    guided: bool
    steps: tuple[int, ...]


def step_groups(
    parts: Parts, stage: DenoisingStage, part: RefiningSteps, guidance: Guidance, routed: bool, switch: float | None
) -> list[StepGroup]:
    """The steps of a stage by what they cost, in the order in which they first occur.

    Args:
        parts: its transformer, or its refiner, runs.
        stage: "motion" or "refine".
        part: latent frames, height and width, steps of the whole schedule, and the number of first ones left out.
        guidance: see Guidance.
        routed: whether experts act in their bands.
        switch: sigma at which the bands should meet; None leaves them as they are.
    """
    model = parts.transformer if stage == "motion" else parts.refiner
    denoiser, schedule = denoiser_of(model), parts.configs.schedule
    tokens = denoiser.token_grid(part.grid)
    choose = expert_chooser(model, switch=switch) if routed and expert_names(model) else None
    found: dict[tuple[Any, ...], list[int]] = {}
    for place, (timestep, sigma) in list(enumerate(schedule.steps(part.steps)))[part.skip :]:
        expert = None if choose is None else choose(timestep)
        level = sigma_of_timestep(float(timestep), schedule.train_timesteps)
        pairs = pairs_by_block(denoiser.attention, tokens, len(denoiser.blocks), level)
        found.setdefault((expert, pairs, guidance.at(sigma)), []).append(place)
    return [
        StepGroup(expert, pairs, is_dense(pairs, tokens), guided, tuple(places))
        for (expert, pairs, guided), places in found.items()
    ]


def pairs_by_block(attention: Attention | None, tokens: Grid, blocks: int, sigma: float) -> tuple[int, ...]:
    """Query-key products of one head and sample in each block; None is dense attention."""
    if attention is None:
        return (prod(tokens) ** 2,) * blocks
    return tuple(attention.pairs(tokens, layer, sigma) for layer in range(blocks))


def is_dense(pairs: tuple[int, ...], tokens: Grid) -> bool:
    """Whether every block computes all pairs of tokens."""
    return pairs == pairs_by_block(None, tokens, len(pairs), 0.0)
