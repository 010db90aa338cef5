"""The Triton kernels on a GPU, with the channels of Wan2.1's VAE, against PyTorch's operations in float32.

tests/functional/frames runs them in Triton's interpreter; here they are compiled, in both halves of precision.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luve_lightning.functional.frames import Convolution, Norm, attended, bordered, inside
from tests.helpers.gpu import BF16, error
from tests.helpers.noise import noise

DTYPES = [torch.bfloat16, torch.float16]
# A norm's result is rounded before the convolution and the sum after it, each by a fifth of eps on average.
NEAR = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}

pytestmark = pytest.mark.only_gpu


def drawn(dtype: torch.dtype, *shape: int) -> Tensor:
    """Frames T x H x W x C that the dtype holds exactly."""
    return noise(*shape).to(dtype).float()


def framed(x: Tensor, device: torch.device, dtype: torch.dtype, channels: int | None = None) -> Tensor:
    """Frames with a border, and with channels of zeros up to so many."""
    frames, height, width, count = x.shape
    out = bordered(frames, height, width, channels or count, x.to(device, dtype))
    inside(out)[..., :count].copy_(x)
    return out


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel"),
    [
        (16, 384, (3, 3, 3)),  # the decoder's first
        (384, 384, (3, 3, 3)),
        (192, 384, (3, 1, 1)),  # twice the frames
        (96, 96, (3, 3, 3)),  # a tile of 128 channels, of which 96 are
        (384, 192, (1, 3, 3)),  # twice the height and width
        (96, 3, (3, 3, 3)),  # pixels
    ],
)
def test_a_convolution_is_pytorchs(
    device: torch.device, inputs: int, outputs: int, kernel: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """After a norm, in two chunks of which the second remembers the first; then with a residual."""
    conv: Any = nn.Conv3d(inputs, outputs, kernel) if kernel[0] == 3 else nn.Conv2d(inputs, outputs, kernel[1:])
    conv.weight.copy_(conv.weight.to(dtype))
    gamma = 1 + 0.1 * noise(inputs)
    x = drawn(dtype, 5, 9, 14, inputs)
    normed = F.silu(F.normalize(x, dim=-1) * inputs**0.5 * gamma)
    weight = conv.weight if conv.weight.ndim == 5 else conv.weight[:, :, None]
    side, before = kernel[1] // 2, kernel[0] - 1
    padded = F.pad(normed.permute(3, 0, 1, 2), (side, side, side, side, before, 0))
    want = F.conv3d(padded[None], weight, conv.bias)[0].permute(1, 2, 3, 0)

    ours = Convolution.of(conv.to(device), dtype, Norm(gamma.to(device), True, dtype))
    assert ours.matrix is not None, "the kernel runs"
    past: dict[int, Tensor] = {}
    given = framed(x, device, dtype, ours.inputs)
    chunks = [ours(part.clone(), past) for part in (given[:2], given[2:])]
    got = torch.cat([inside(chunk)[..., :outputs] for chunk in chunks])
    assert error(got, want) < NEAR[dtype]
    assert all(not chunk[:, -1].any() and not chunk[:, :, -1].any() for chunk in chunks), "the border is zero"

    residual = drawn(dtype, 5, 9, 14, outputs)
    summed = ours.run(*ours.fill(given, {}), framed(residual, device, dtype, ours.outputs))
    assert error(inside(summed)[..., :outputs], want + residual) < NEAR[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("channels", [96, 384])
def test_a_norm_and_its_gradient_are_pytorchs(
    device: torch.device, channels: int, active: bool, dtype: torch.dtype
) -> None:
    gamma, x, gradient, more = 1 + 0.1 * noise(channels), *(drawn(dtype, 3, 9, n, channels) for n in (14, 14, 14))
    norm = Norm(gamma.to(device), active, dtype)
    seen = x.clone().requires_grad_()
    y = F.normalize(seen, dim=-1) * channels**0.5 * gamma
    want = F.silu(y) if active else y
    [of_x] = torch.autograd.grad((want * gradient).sum(), seen)
    given = framed(x, device, dtype)
    got = torch.empty_like(given)
    norm(given, got)
    assert error(inside(got), want) < NEAR[dtype] / 2
    assert not got[:, -1].any()
    assert not got[:, :, -1].any()
    for add in (None, more):
        added = None if add is None else framed(add, device, dtype)
        found = norm.gradient(given, framed(gradient, device, dtype), added)
        assert error(inside(found), of_x if add is None else of_x + add) < NEAR[dtype] / 2


@torch.no_grad()
@pytest.mark.parametrize("tokens", [70, 384])
def test_wide_attention_is_pytorchs(device: torch.device, tokens: int) -> None:
    """Whole tiles and a part of one; queries, keys and values are slices of one tensor."""
    qkv = noise(3, tokens, 3 * 384).bfloat16()
    want = F.scaled_dot_product_attention(*qkv.float().chunk(3, dim=-1))
    got = attended(*qkv.to(device).chunk(3, dim=-1))
    assert error(got, want) < BF16
