"""Linear attention beside a sparse one."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

_CHUNK = 16384  # tokens at a time, so that what is computed of them is still in a GPU's cache when it is needed


class LinearBranch(nn.Module):
    """Linear attention of every token to all tokens, projected by matrices that start at zero.

    With φ the softmax over a head's width, head by head:

        o_i = (φ(q_i) Σ_j φ(k_j)ᵀ v_j) / (φ(q_i) · Σ_j φ(k_j)) P

    It is added to a sparse attention's output, to carry what that leaves out, as in SLA (arXiv 2509.24006, whose φ
    this is) and SALAD (arXiv 2601.16515). P starts at zero, so a transformer computes at first what it computes
    without the branch. Unlike SLA, the sums run over all tokens, not over the pairs that the sparse attention treats
    as marginal, so they cost one pass; and each head has its own P. Unlike SALAD, no gate depends on the input. Time
    and memory grow with N.

    Args:
        heads: attention heads.
        width: channels of a head.
    """

    by_head = True
    """The first axis of its parameters is the heads: part of them is the branch of part of the heads."""

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
        # Autocast would run softmax, and keep its results, in float32.
        with nullcontext() if query.is_meta else torch.autocast(query.device.type, enabled=False):
            means, weight = _summed(key.to(dtype), value.to(dtype))
            projected = torch.einsum("bhde,hef->bhdf", means, self.projection.to(means.dtype)).to(dtype)
            # With w_d = Σ_j φ(k_j)_d: φ(q)_d / Σ_e φ(q)_e w_e = softmax(q + log w)_d / w_d. Softmax ignores what
            # all channels have in common.
            logarithm = weight.log()
            shift = (logarithm - logarithm.mean(-1, keepdim=True)).to(dtype)[:, None]
            parts = [(q + shift).softmax(-1) for q in query.split(_CHUNK, 1)]
            return torch.cat([torch.einsum("bnhd,bhdf->bnhf", q, projected) for q in parts], 1)


def _summed(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Values averaged with the weights φ(k)_d, B x heads x width (of keys) x width, and the sums of these weights.

    Sums over chunks are in float32 or wider.
    """
    exact = torch.float64 if key.dtype == torch.float64 else torch.float32
    contents, weights = [], []
    for k, v in zip(key.split(_CHUNK, 1), value.split(_CHUNK, 1), strict=True):
        feature = k.softmax(-1)
        contents.append(torch.einsum("bnhd,bnhe->bhde", feature, v).to(exact))
        weights.append(feature.sum(1, dtype=exact))
    # A channel in which no key has a weight adds nothing.
    weight = torch.stack(weights).sum(0).clamp_min(torch.finfo(exact).tiny)
    return torch.stack(contents).sum(0) / weight[..., None], weight
