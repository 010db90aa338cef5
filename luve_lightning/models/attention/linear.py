"""Linear attention beside a sparse one."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

_CHUNK = 16384  # tokens whose keys and values are summed by one matrix product


class LinearBranch(nn.Module):
    """Linear attention of every token to all tokens, projected by matrices that start at zero.

    With φ the softmax over a head's width, head by head:

        o_i = (φ(q_i) Σ_j φ(k_j)ᵀ v_j) / (φ(q_i) · Σ_j φ(k_j)) P

    It is added to a sparse attention's output, to carry what that leaves out, as in SLA (arXiv 2509.24006, whose φ
    this is) and SALAD (arXiv 2601.16515). Unlike SLA, the sums run over all tokens, not over
    the pairs that the sparse attention treats as marginal, so they cost one pass; and each head has its own P.
    Unlike SALAD, no gate depends on the input, queries and keys are the rotated ones, and P starts at zero, so a
    transformer computes at first what it computes without the branch. Time and memory grow with N.

    Args:
        heads: attention heads.
        width: channels of a head.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.zeros(heads, width, width))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What to add to the sparse attention, in its dtype.

        Args:
            query: B x N x heads x width.
            key: likewise.
            value: likewise.
        """
        dtype = query.dtype
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        # Autocast would run softmax, and keep its results, in float32.
        with nullcontext() if query.is_meta else torch.autocast(query.device.type, enabled=False):
            query, key, value = query.softmax(-1), key.to(dtype).softmax(-1), value.to(dtype)
            # Means rather than sums, so that their size does not grow with N: it cancels in the quotient.
            tokens = key.shape[1]
            content = self._content(key, value, exact) / tokens
            weight = key.mean(1, dtype=exact)
            projected = torch.einsum("bhde,hef->bhdf", content, self.projection.to(exact))
            above = torch.einsum("bnhd,bhdf->bnhf", query, projected.to(dtype))
            below = torch.einsum("bnhd,bhd->bnh", query, weight.to(dtype))
            return above / below[..., None]

    @staticmethod
    def _content(key: Tensor, value: Tensor, exact: torch.dtype) -> Tensor:
        """Σ_j φ(k_j)ᵀ v_j: B x heads x width x width, summed over chunks in float32 or wider."""
        chunks = zip(key.split(_CHUNK, 1), value.split(_CHUNK, 1), strict=True)
        products = [torch.einsum("bnhd,bnhe->bhde", k, v).to(exact) for k, v in chunks]
        return torch.stack(products).sum(0)
