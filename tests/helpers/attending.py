"""An attention of another package: each token gathers from those of its own latent frame."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from luve_lightning.functional.frequency import Grid
from luve_lightning.models.attention import Attention, Where


@dataclass(frozen=True)
class FrameAttention(Attention):
    """Attention within `frames` successive latent frames."""

    frames: int = 1

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, where: Where, branch: nn.Module | None = None
    ) -> Tensor:
        size = self.frames * where.grid[1] * where.grid[2]
        parts = [x.unflatten(1, (-1, size)).transpose(2, 3) for x in (query, key, value)]
        return scaled_dot_product_attention(*parts).transpose(2, 3).flatten(1, 2)

    def pairs(self, grid: Grid, layer: int, sigma: float) -> int:
        return prod(grid) * self.frames * grid[1] * grid[2]


@dataclass(frozen=True)
class LearnedFrameAttention(FrameAttention):
    """The same with a linear layer of the values, which starts at zero."""

    def branch(self, heads: int, width: int) -> nn.Module:
        linear = nn.Linear(width, width, bias=False)
        nn.init.zeros_(linear.weight)
        return linear

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, where: Where, branch: nn.Module | None = None
    ) -> Tensor:
        assert branch is not None
        return super().__call__(query, key, value, where) + branch(value)
