"""Where tests of a GPU run, and how far rounding takes numbers there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

DEVICE = torch.device(os.environ.get("LUVE_TEST_DEVICE", "cuda"))
"""cuda; with LUVE_TEST_DEVICE=cpu their logic can be tried without a GPU, except what needs its kernels or memory."""

BF16 = torch.finfo(torch.bfloat16).eps  # 2^-7; rounding is off by half of it at most, and by a fifth on average
FLOAT32 = 2e-5
"""Error of a few layers in float32, whose eps is 1.2e-7: a hundred roundings, and convolutions by Winograd's method,
which round ten times as coarsely. TF32's error would be fifty times this."""


def lacking(devices: int) -> str | None:
    """Why tests of so many GPUs cannot run here; None where they can."""
    if DEVICE.type == "cpu":
        return None
    found = torch.cuda.device_count()
    if found >= devices:
        return None
    return f"needs {'a GPU' if devices == 1 else f'{devices} GPUs'}, PyTorch sees {found or 'none'} here"


def error(got: Tensor | Sequence[Tensor], exact: Tensor | Sequence[Tensor]) -> float:
    """||got - exact|| / ||exact|| of tensors, over all of their elements."""
    got, exact = ([x] if isinstance(x, Tensor) else list(x) for x in (got, exact))
    pairs = [(g.detach().double().cpu(), e.detach().double().cpu()) for g, e in zip(got, exact, strict=True)]
    assert all(g.shape == e.shape for g, e in pairs)
    off, norm = (sum(float(x.square().sum()) for x in xs) for xs in ([g - e for g, e in pairs], [e for _, e in pairs]))
    assert norm > 0
    return float((off / norm) ** 0.5)


def assert_rounds_like(
    got: Tensor | Sequence[Tensor], plain: Tensor | Sequence[Tensor], exact: Tensor | Sequence[Tensor]
) -> None:
    """Check that `got` is about as far from the exact numbers as a plain computation in the same precision.

    Both round to bfloat16, in other places. Errors over thousands of elements differ by little from draw to draw, so
    a half more is what another order of roundings explains; anything wrong is off by many times as much.
    """
    ours, theirs = error(got, exact), error(plain, exact)
    assert theirs < 20 * BF16, f"the plain computation is off by {theirs:.2g}, which says nothing"
    assert 0 < ours < 1.5 * theirs, f"off by {ours:.2g}, the plain computation by {theirs:.2g}"


def coarse(module: nn.Module) -> Any:
    """The module with weights that bfloat16 holds exactly, so that its casts lose nothing; in place."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())
    return module


def gradients(output: Tensor, inputs: Iterable[Tensor]) -> list[Tensor]:
    """An output, and the gradients of a weighted sum of it; the weights are the same on each device."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).bfloat16().to(output)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), list(inputs))]
