"""What the transformer's passes cost: a replaced self-attention, counted in a dry run, and a training step.

What an attention costs may depend on the noise level, so denoising steps are grouped by it.

A training step is counted as it runs: forward and backward, under autocast, with what it recomputes. Its peak is the
weights, the optimiser's state (two numbers in float32 for each trained one) and what the passes allocate, gradients
included. At 2K and 49 frames with `recompute: all_but_attention` that is 77.7 GiB for the adaptation of Wan2.1-1.3B and
54.5 GiB for the LFE, as measured on one GPU (docs/performance.md); the estimated durations are 4 % less than the
measured ones. Compiled blocks take less: 65.2 GiB instead of the planned 69.5 for the LFE with windows at 2K.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from luve_lightning.analysis.cost import GpuSpeed
from luve_lightning.analysis.dry_run import CUBLAS_WORKSPACE, DryRun, dry_training, touched_bytes, weight_bytes
from luve_lightning.analysis.model_parts import DenoisingStage, Parts
from luve_lightning.cascade.denoise import expert_chooser
from luve_lightning.cascade.options import Guidance
from luve_lightning.functional.flow_matching import noised, sigma_of_timestep, velocity
from luve_lightning.functional.frequency import Grid
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.models.attention import Attention, Where
from luve_lightning.models.backbones import Denoiser, denoiser_of
from luve_lightning.models.experts import expert_names

DENSE = "dense"


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
    parts: Parts, stage: DenoisingStage, grid: Size3d, steps: int, skip: int, guidance: Guidance, routed: bool
) -> list[StepGroup]:
    """The steps of a stage by what they cost, in the order in which they first occur.

    Args:
        parts: its transformer, or its refiner, runs.
        stage: "motion" or "refine".
        grid: latent frames, height and width.
        steps: steps of the whole schedule.
        skip: number of first steps left out.
        guidance: see Guidance.
        routed: whether experts act in their bands.
    """
    model = parts.transformer if stage == "motion" else parts.refiner
    denoiser, schedule = denoiser_of(model), parts.configs.schedule
    tokens = denoiser.token_grid(grid)
    choose = expert_chooser(model) if routed and expert_names(model) else None
    found: dict[tuple[Any, ...], list[int]] = {}
    for place, (timestep, sigma) in list(enumerate(schedule.steps(steps)))[skip:]:
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


@contextmanager
def counting_attention(denoiser: Denoiser, run: DryRun) -> Iterator[None]:
    """Count a replaced attention's own kernels, which leave no number of operations, by its `pairs`."""
    attention = denoiser.attention
    if attention is None:
        yield
        return
    denoiser.set_attention(CountedAttention(attention, run))
    try:
        yield
    finally:
        denoiser.set_attention(attention)


class CountedAttention:
    """An attention whose pairs that PyTorch's attention did not compute count as a kernel's that skips pairs.

    Args:
        attention: runs, on the meta device.
        run: counts it.
    """

    def __init__(self, attention: Attention, run: DryRun) -> None:
        self.attention, self.run = attention, run

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, where: Where, branch: nn.Module | None = None
    ) -> Tensor:
        """See Attention."""
        batch, _, heads, width = query.shape
        sigmas = where.sigmas or (0.0,) * batch
        pairs = sum(self.attention.pairs(where.grid, where.layer, sigma) for sigma in sigmas)
        before, self.run.in_attention = self.run.attended, True
        try:
            output = self.attention(query, key, value, where, branch)
        finally:
            self.run.in_attention = False
        missing = 4 * heads * width * pairs - (self.run.attended - before)
        if missing > 0:
            moved = sum(map(touched_bytes, (query, key, value, output)))
            self.run.add("block-sparse attention", missing, moved, query.dtype)
        return output


# What CUDA's autocast runs in 16 bits and in float32, of what transformers call.
_LOWER = frozenset((F.linear, torch.matmul, torch.bmm, torch.Tensor.matmul, F.conv2d, F.conv3d))
_HIGHER = frozenset((F.layer_norm, torch.layer_norm, F.softmax, torch.softmax))


@dataclass(frozen=True)
class TrainingStep:
    """What one training step takes. Memory is in bytes.

    Attributes:
        name: the bucket.
        latents: frames, height and width of a sample.
        tokens: tokens of a sample.
        batch: samples.
        flops: floating-point operations of the forward and the backward pass.
        weights: the transformer's weights.
        optimizer: AdamW's state.
        passes: what the passes allocate at their peak, gradients included.
        peak: the most of the whole step.
        terms: what makes up `passes`, the largest first.
        seconds: estimated duration; None without a GPU's speed, or where it lacks the rate of an operation.
    """

    name: str
    latents: Size3d
    tokens: int
    batch: int
    flops: int
    weights: int
    optimizer: int
    passes: int
    peak: int
    terms: Mapping[str, int]
    seconds: float | None


class _TrainingFunctions(TorchFunctionMode):
    """What a GPU runs in training: one kernel for attention and for an RMS norm, and autocast's casts.

    Attributes:
        casts: 16-bit copies of trained weights, which autocast keeps until the forward pass ends; None afterwards.
    """

    def __init__(self, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.autocast = autocast
        self.casts: dict[int, Tensor] | None = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = [*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)][:3]
            query, key, value = (self._cast(x, self.autocast or x.dtype) for x in given)
            # The operator itself, which tells selective recomputation what it is.
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        if func in (F.rms_norm, torch.rms_norm):
            weight = args[2] if len(args) > 2 else kwargs.get("weight")
            if weight is None or weight.dtype == args[0].dtype:
                return _FusedNorm.apply(args[0], weight)
        if self.autocast is not None and func in _LOWER | _HIGHER:
            dtype = self.autocast if func in _LOWER else torch.float32
            args = tuple(self._cast(x, dtype) for x in args)
            kwargs = {name: self._cast(x, dtype) for name, x in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, x: Any, dtype: torch.dtype) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == dtype:
            return x
        if self.casts is None or not (x.is_leaf and x.requires_grad):
            return x.to(dtype)
        if id(x) not in self.casts:
            self.casts[id(x)] = x.to(dtype)
        return self.casts[id(x)]


class _FusedNorm(torch.autograd.Function):
    """An RMS norm that keeps its input and one number a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


def plan_step(
    denoiser: Denoiser,
    name: str,
    latents: Size3d,
    batch: int,
    text_length: int,
    autocast: torch.dtype | None = None,
    speed: GpuSpeed | None = None,
    compiled: bool = False,
) -> TrainingStep:
    """Plan a step of flow matching on one bucket.

    Args:
        denoiser: on the meta device, with what is trained and what is recomputed set.
        name: the bucket, for people.
        latents: frames, height and width of a sample.
        batch: samples.
        text_length: tokens of a caption.
        autocast: dtype of the Trainer's mixed precision; None where there is none.
        speed: speed of the GPU, for the duration.
        compiled: whether blocks are compiled, which changes the estimated duration; memory is counted as without it.
    """
    tokens = prod(denoiser.token_grid(latents))
    trained = [parameter for parameter in denoiser.module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = None
    functions = _TrainingFunctions(autocast)
    blocks = [block for _, block in denoiser.blocks] if compiled else []
    clean, noise = (torch.empty(batch, denoiser.channels, *latents, device="meta") for _ in range(2))
    text = torch.empty(batch, text_length, denoiser.text_dim, device="meta", dtype=denoiser.dtype)
    sigma = torch.empty(batch, device="meta")
    with dry_training(functions, blocks) as run:
        mixed = noised(clean, noise, sigma).to(denoiser.dtype)
        loss = (denoiser.velocity(mixed, sigma, text).float() - velocity(clean, noise)).square().mean()
        functions.casts = None
        # Not `loss.backward()`, which runs without function modes.
        engine: Any = torch.autograd.Variable._execution_engine
        engine.run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
        del loss, mixed
    for parameter in trained:
        parameter.grad = None
    weights = weight_bytes(denoiser.module)
    optimizer = sum(2 * 4 * parameter.numel() for parameter in trained)
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    # AdamW's own step holds all gradients and one more tensor as large.
    peak = weights + optimizer + max(run.peak + CUBLAS_WORKSPACE, 2 * gradients)
    seconds = None if speed is None else speed.seconds(run.operations)
    return TrainingStep(name, latents, tokens, batch, run.flops, weights, optimizer, run.peak, peak, run.terms, seconds)
