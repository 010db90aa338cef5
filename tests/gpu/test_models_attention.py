"""Every attention on a GPU, forward and gradients, against a CPU: PyTorch's kernels and FlexAttention's.

Heads are 128 wide, as in Wan2.1, and the tokens enough for Tiles to run by blocks (more than 4096), in tiles of which
the last of each axis is smaller. What the attentions mean is tested against plain masks in tests/models/attention.
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from luve_lightning.models.attention import Where
from luve_lightning.models.attention.dense import Dense
from luve_lightning.models.attention.sparse import LinearBranch
from luve_lightning.models.attention.tiles import Tiles
from luve_lightning.models.attention.windows import Windows
from tests.helpers.gpu import BF16, DEVICE, error, gradients

GRID, WIDTH = (3, 36, 40), 128
BATCHES = {1: (2, (0.5,)), 3: (1, (0.95, 0.5, 0.2))}  # by samples: heads and noise levels
KINDS: dict[str, Any] = {
    "dense": Dense(),
    "windows": Windows(((1, 5, 3), (3, 1, 1))),
    "remote windows": Windows(((2, 2, 4),), ways="remote", linear=True),
    "tiles": Tiles((2, 8, 8), (2, 3, 3)),
    "tiles, dense at high noise": Tiles((2, 8, 8), (1, 2, 5), dense_above=0.9, linear=True),
}


@cache
def drawn(batch: int) -> list[Tensor]:
    """Queries, keys and values that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, prod(GRID), BATCHES[batch][0], WIDTH)
    return [torch.randn(shape, generator=generator).bfloat16().double() for _ in range(3)]


def attended(kind: str, batch: int, device: torch.device, dtype: torch.dtype, autocast: bool = False) -> list[Tensor]:
    """What is attended to, and the gradients of queries, keys, values, and of the linear branch."""
    heads, sigmas = BATCHES[batch]
    inputs = [x.to(device, dtype, copy=True).requires_grad_() for x in drawn(batch)]  # which are kept as they are
    attention, where = KINDS[kind], Where(GRID, 0, sigmas)
    branch = attention.branch(heads, WIDTH)
    if branch is not None:
        assert isinstance(branch, LinearBranch)
        torch.nn.init.normal_(branch.projection, std=WIDTH**-0.5)
        branch.projection.data = branch.projection.data.bfloat16().to(device, dtype)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        output = attention(*inputs, where, branch)
    return gradients(output, [*inputs, *([] if branch is None else branch.parameters())])


@cache
def exact(kind: str, batch: int) -> list[Tensor]:
    torch.manual_seed(0)
    return attended(kind, batch, torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_cpus(device: torch.device, kind: str, batch: int) -> None:
    want = exact(kind, batch)
    if batch == 1:  # each dtype and size is a kernel to be compiled
        torch.manual_seed(0)
        single = attended(kind, batch, device, torch.float32)
        assert [x.device.type for x in single] == [device.type] * len(single)
        for got, reference in zip(single, want, strict=True):
            assert error(got, reference) < 1e-5  # eps is 1.2e-7; TF32 would be off by 5e-4
    torch.manual_seed(0)
    output, *of_inputs = attended(kind, batch, device, torch.bfloat16)
    # Kernels round the softmax and their result to bfloat16, each by a fifth of its eps on average; in the gradients
    # the gradient of the softmax, too, and what is subtracted from it. On a CPU these are off by 0.4 and 0.7 eps.
    assert error(output, want[0]) < BF16
    for got, reference in zip(of_inputs, want[1:], strict=True):
        assert error(got, reference) < 2 * BF16


@pytest.mark.parametrize("kind", ["tiles", "remote windows"])
def test_autocast_runs_the_kernels_in_bfloat16(device: torch.device, kind: str) -> None:
    torch.manual_seed(0)
    output, *of_inputs = attended(kind, 1, device, torch.float32, autocast=True)
    for got, reference in zip((output, *of_inputs), exact(kind, 1), strict=True):
        # On a CPU, Tiles' mask is no kernel of its own, and autocast rounds the products, too.
        assert error(got, reference) < (2 * BF16 if DEVICE.type == "cuda" else 3 * BF16)
    assert error(output, exact(kind, 1)[0]) > BF16 / 50, "it ran in float32"


@pytest.mark.only_gpu
def test_blocks_are_what_runs_for_long_clips_and_shapes_share_nothing_wrong(device: torch.device) -> None:
    """A second grid, and one sample more, after a first was compiled: tables belong to their grid."""
    tiles = Tiles((2, 8, 8), (2, 3, 3))
    for grid, batch in (((3, 36, 40), 1), ((4, 40, 32), 2), ((3, 36, 40), 2), ((4, 40, 32), 1)):
        generator = torch.Generator().manual_seed(sum(grid) + batch)
        inputs = [torch.randn(batch, prod(grid), 1, WIDTH, generator=generator).bfloat16() for _ in range(3)]
        want = tiles(*(x.float() for x in inputs), Where(grid, 0))
        with torch.no_grad():
            got = tiles(*(x.to(device) for x in inputs), Where(grid, 1))
        assert error(got, want) < BF16


@pytest.mark.only_gpu
def test_without_gradients_in_inference_mode_and_then_with_them(device: torch.device) -> None:
    """What a sample drawn while training makes, training uses."""
    inputs = [x.to(device, torch.bfloat16) for x in drawn(1)]
    with torch.inference_mode():
        before = KINDS["tiles"](*inputs, Where((4, 30, 36), 0))
    inputs = [x.clone().requires_grad_() for x in inputs]
    after = KINDS["tiles"](*inputs, Where((4, 30, 36), 0))
    assert torch.equal(after, before)
    after.float().square().sum().backward()
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in inputs)
