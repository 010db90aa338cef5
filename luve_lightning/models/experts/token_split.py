"""Tokens that are split over processes, for filters, which need them all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TokenSplit:
    """Each process of a group holds an equal part of the tokens, in the order of the ranks (context parallelism).

    Attributes:
        group: the processes.
    """

    group: dist.ProcessGroup

    def gather(self, part: Tensor) -> Tensor:
        """All tokens, B x N x C, of this process's part, B x N/P x C; without gradient."""
        parts = [torch.empty_like(part) for _ in range(self.group.size())]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)

    def own(self, tokens: Tensor) -> Tensor:
        """This process's part of all tokens."""
        return tokens.chunk(self.group.size(), dim=1)[self.group.rank()]
