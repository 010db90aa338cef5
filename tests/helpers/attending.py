"""An attention of another package: each token gathers from those of its own latent frame."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from luve_lightning.functional.frequency import Grid
from luve_lightning.models.attention import Attention


@dataclass(frozen=True)
class FrameAttention(Attention):
    """Attention within `frames` successive latent frames."""

    frames: int = 1

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid) -> Tensor:
        size = self.frames * grid[1] * grid[2]
        parts = [x.unflatten(1, (-1, size)).transpose(2, 3) for x in (query, key, value)]
        return scaled_dot_product_attention(*parts).transpose(2, 3).flatten(1, 2)
