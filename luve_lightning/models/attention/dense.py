"""Every token attends to every token."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from luve_lightning.functional.frequency import Grid
from luve_lightning.models.attention import Attention, Where


@dataclass(frozen=True)
class Dense(Attention):
    """Dense attention, the backbones' own, by PyTorch's fastest kernel."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, where: Where, branch: nn.Module | None = None
    ) -> Tensor:
        """See Attention."""
        del where, branch
        return attend(query, key, value)

    def pairs(self, grid: Grid, layer: int, sigma: float) -> int:
        """See Attention."""
        del layer, sigma
        return prod(grid) ** 2


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dense attention of queries B x N x heads x width to keys and values B x M x heads x width."""
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return scaled_dot_product_attention(q, k, v).transpose(1, 2)
