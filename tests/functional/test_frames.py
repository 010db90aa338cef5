"""Causal layers on frames with a border against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from luve_lightning.functional.frames import Convolution, Norm, bordered, inside, kernels_suit
from tests.helpers.noise import noise


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1)])
def test_a_convolution_goes_on_where_the_last_chunk_ended(kernel: tuple[int, int, int]) -> None:
    side = kernel[1] // 2
    module = nn.Conv3d(3, 5, kernel, padding=(0, side, side)).double().requires_grad_(False)
    clip = noise(1, 3, 7, 4, 6).double()
    want = module(F.pad(clip, (0, 0, 0, 0, 2, 0)))[0].permute(1, 2, 3, 0)
    conv = Convolution.of(module, torch.float64)
    for lengths in ([7], [1, 1, 2, 3], [4, 3]):
        past: dict[int, torch.Tensor] = {}
        parts = []
        for part in clip[0].split(lengths, dim=1):
            x = bordered(part.shape[1], 4, 6, 3, part)
            inside(x).copy_(part.permute(1, 2, 3, 0))
            parts.append(conv(x, past))
        got = torch.cat(parts)
        torch.testing.assert_close(inside(got), want)
        assert got[:, -1].abs().sum() == got[:, :, -1].abs().sum() == 0


def test_a_norms_gradient_adds_what_it_is_given_and_has_no_border() -> None:
    norm = Norm(noise(6), True, torch.float64)
    x, gradient, add = (noise(2, 4, 5, 6).double() for _ in range(3))
    seen = inside(x).clone().requires_grad_()
    [want] = torch.autograd.grad(norm.values(seen), seen, inside(gradient))
    got = norm.gradient(x, gradient, add)
    torch.testing.assert_close(inside(got), want + inside(add))
    assert got[:, -1].abs().sum() == got[:, :, -1].abs().sum() == 0


def test_kernels_are_for_half_precision_on_a_gpu() -> None:
    assert not kernels_suit(torch.device("cpu"), torch.bfloat16)
    assert kernels_suit(torch.device("meta"), torch.bfloat16)
    assert not kernels_suit(torch.device("meta"), torch.float32)
    assert not kernels_suit(torch.device("cuda"), torch.float32)
