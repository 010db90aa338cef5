"""What the sparse attentions share: where they stay dense, their linear branch, and tokens in another order."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luve_lightning.functional.frequency import Grid
from luve_lightning.models.attention import Attention, Where
from luve_lightning.models.attention.dense import Dense

IndexTable = np.ndarray[Any, np.dtype[Any]]
"""Whole numbers or truth values."""

_CHUNK = 16384  # tokens at a time, so that what is computed of them is still in a GPU's cache when it is needed


@dataclass(frozen=True, kw_only=True)
class SparseAttention(Attention):
    """Self-attention in which a token attends to some of the tokens.

    Args:
        dense_layers: numbers of the blocks that attend densely, from 0.
        dense_above: noise level from which a sample attends densely, in (0, 1]; None is never. The layout of a
            video is decided at high noise, in few steps.
        linear: whether each block has a linear branch, see LinearBranch. It adds nothing where attention is dense.

    Raises:
        ValueError: for settings outside these.
    """

    dense_layers: tuple[int, ...] = ()
    dense_above: float | None = None
    linear: bool = False

    def __post_init__(self) -> None:
        """Check the settings; JSON's lists become tuples."""
        self._set("dense_layers", self._whole_numbers("dense_layers", self.dense_layers, 0, None))
        above = self.dense_above
        if above is not None and (not _is_number(above) or not 0 < above <= 1):
            raise self._wrong("dense_above", "a noise level above 0 and at most 1, or null", above)
        if not isinstance(self.linear, bool):
            raise self._wrong("linear", "true or false", self.linear)

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, layer: int) -> Tensor:
        """The sparse attention alone, B x N x heads x width like its inputs."""

    @abstractmethod
    def sparse_pairs(self, grid: Grid, layer: int) -> int:
        """Number of query-key products of one head of one sample in `attend`."""

    @property
    def needs_sigma(self) -> bool:
        """Whether it depends on the noise levels."""
        return self.dense_above is not None

    def is_dense(self, layer: int, sigma: float | None) -> bool:
        """Whether a sample at this noise level attends densely in this block.

        Raises:
            ValueError: where that depends on the noise level and there is none.
        """
        if layer in self.dense_layers:
            return True
        if self.dense_above is None:
            return False
        if sigma is None:
            raise ValueError(f"attention {type(self).__name__}: dense_above needs the noise level of every sample")
        return sigma >= self.dense_above

    def pairs(self, grid: Grid, layer: int, sigma: float) -> int:
        """Number of query-key products of one head of one sample."""
        if self.is_dense(layer, sigma):
            return Dense().pairs(grid, layer, sigma)
        return self.sparse_pairs(grid, layer)

    def check(self, layers: int) -> None:
        """See Attention."""
        if any(layer >= layers for layer in self.dense_layers):
            expected = f"layers of a transformer of {layers}, 0 to {layers - 1}"
            raise self._wrong("dense_layers", expected, list(self.dense_layers))

    def branch(self, heads: int, width: int) -> LinearBranch | None:
        """The linear branch of one block, if there is one."""
        return LinearBranch(heads, width) if self.linear else None

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, where: Where, branch: nn.Module | None = None
    ) -> Tensor:
        """What each token gathers; see Attention.

        The samples of a batch may differ in noise level, and so in attention.
        """
        sigmas = where.sigmas or (None,) * len(query)
        dense = [self.is_dense(where.layer, sigma) for sigma in sigmas]
        assert len(dense) == len(query), f"{len(dense)} noise levels of {len(query)} samples"
        if len(set(dense)) == 1:
            return self._alike(query, key, value, where, branch, dense[0])
        samples = zip(query.split(1), key.split(1), value.split(1), dense, strict=True)
        return torch.cat([self._alike(q, k, v, where, branch, is_dense) for q, k, v, is_dense in samples])

    def _alike(
        self, query: Tensor, key: Tensor, value: Tensor, where: Where, branch: nn.Module | None, dense: bool
    ) -> Tensor:
        """The attention of samples that are all dense or all sparse."""
        if not dense:
            output = self.attend(query, key, value, where.grid, where.layer)
            return output if branch is None else output + branch(query, key, value)
        output = Dense()(query, key, value, where)
        if branch is None or not torch.is_grad_enabled():
            return output
        # Every parameter gets a gradient in every step, zero here: DDP waits for the gradients of all of them.
        idle = [parameter.sum() for parameter in branch.parameters() if parameter.requires_grad]
        return output + 0 * torch.stack(idle).sum().to(output.dtype) if idle else output

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the one way to complete a frozen dataclass

    def _wrong(self, name: str, expected: str, value: object) -> ValueError:
        return ValueError(f"attention {type(self).__name__}: {name}: expected {expected}, got {value!r}")

    def _whole_numbers(self, name: str, values: Any, least: int, length: int | None) -> tuple[int, ...]:
        """A list of whole numbers as a tuple, checked."""
        numbers = tuple(values) if isinstance(values, list | tuple) else (None,)
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
        if not whole or min(numbers, default=least) < least or length not in (None, len(numbers)):
            count = "" if length is None else f"{length} "
            raise self._wrong(name, f"{count}whole numbers of at least {least}", values)
        return numbers


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def rows(tokens: Tensor) -> Tensor:
    """B x N x heads x width as a matrix with one row a token of the batch."""
    return tokens.reshape(-1, tokens.shape[-2] * tokens.shape[-1])


def take(x: Tensor, index: Tensor, back: Tensor, kept: Tensor | None = None) -> Tensor:
    """Rows `x[index]`, whose gradient is taken by an index as well.

    That of `index_select` adds up with atomic operations, which is slow and differs from run to run.

    Args:
        x: matrix.
        index: the row of `x` at each place of the result.
        back: for each row of `x`, the one place of the result from which its gradient comes.
        kept: whether that row is used at all, else its gradient is zero; None means each is.
    """
    taken: Tensor = _Take.apply(x, index, back, kept)
    return taken


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, kept: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, kept)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        back, kept = ctx.saved_tensors
        gradient = gradient.index_select(0, back)
        if kept is not None:
            gradient = gradient.masked_fill_(~kept[:, None], 0)
        return gradient, None, None, None


@torch.compiler.disable  # tracing would look through the caches and make the tables anew in every pass
def indices(make: Callable[..., list[IndexTable]], like: Tensor, settings: tuple[int, ...]) -> list[Tensor]:
    """Tables of indices on the device of `like`, made once for the same settings.

    Args:
        make: what makes them from whole numbers.
        like: a tensor on the device.
        settings: the numbers.
    """
    return _on_device(make, settings, str(like.device))


@lru_cache(maxsize=256)  # windows at 4K: 7 MB for each cut and way
def _on_device(make: Callable[..., list[IndexTable]], settings: tuple[int, ...], device: str) -> list[Tensor]:
    # Training may use what was made while a sample was drawn, and saves no tensors of inference mode.
    with torch.inference_mode(False):
        return [torch.from_numpy(table).to(device) for table in make(*settings)]


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
