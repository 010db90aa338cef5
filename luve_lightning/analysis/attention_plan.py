"""What a replaced self-attention costs: counted in a dry run, and by steps where it depends on the noise level."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from luve_lightning.analysis.dry_run import DryRun, touched_bytes
from luve_lightning.analysis.model_parts import DenoisingStage, Parts
from luve_lightning.cascade.denoise import expert_chooser
from luve_lightning.cascade.options import Guidance
from luve_lightning.functional.flow_matching import sigma_of_timestep
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
