"""Both VLUers on a GPU, in float32 and bfloat16, against a CPU in float64."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luve_lightning.models.vluer import VLUer
from tests.helpers.gpu import FLOAT32, assert_rounds_like, coarse, error
from tests.helpers.noise import noise
from tests.helpers.released import small_released

NETS: dict[str, Any] = {
    "ours": ({"channels": 64, "pairs": 3, "hidden": 96, "layers": 2, "query_channels": 32}, (9, 11), (5, 23, 31)),
    "released": ({}, (64, 72), (2, 72, 64)),
}


def made(kind: str) -> tuple[nn.Module, tuple[int, int, int], tuple[int, int, int]]:
    """A network whose weights are not those it starts with, the size of its input, and of its output."""
    config, (height, width), size = NETS[kind]
    if kind == "released":
        return coarse(small_released()), (2, height, width), size
    net = VLUer(**config).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.05)
    return coarse(net), (3, height, width), size


@torch.no_grad()
@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", NETS)
def test_it_gives_what_the_cpu_gives(device: torch.device, kind: str, batch: int) -> None:
    net, given, size = made(kind)
    latents = noise(batch, 16, *given).bfloat16().float()
    exact = deepcopy(net).double()(latents.double(), size)
    plain = deepcopy(net).bfloat16()(latents.bfloat16(), size)
    net.to(device)
    got = net(latents.to(device), size)
    assert got.device.type == device.type
    assert error(got, exact) < FLOAT32
    with torch.autocast(device.type, torch.bfloat16):
        mixed = net(latents.to(device), size)
    assert mixed.dtype == torch.float32
    half = net.bfloat16()(latents.to(device).bfloat16(), size)
    assert half.dtype == torch.bfloat16
    for rounded in (mixed, half):
        assert_rounds_like(rounded, plain, exact)


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("kind", NETS)
def test_gradients_are_the_cpus(device: torch.device, kind: str) -> None:
    """Those of weights are sums over all positions, which a GPU adds up in another order."""
    net, given, size = made(kind)
    latents = noise(1, 16, *given).bfloat16().float()

    def found(net: nn.Module, latents: Tensor, autocast: bool = False) -> list[Tensor]:
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=autocast):
            output = net.train()(latents, size)
        return list(torch.autograd.grad(output.square().mean(), list(net.parameters())))

    exact = found(deepcopy(net).double(), latents.double())
    single = error(found(deepcopy(net), latents), exact)  # 3e-4 in the released one
    assert error(found(deepcopy(net).to(device), latents.to(device)), exact) < max(4 * single, FLOAT32)
    if kind == "ours":  # the released network's random weights make bfloat16 useless in its gradients
        plain = found(deepcopy(net), latents, autocast=True)
        assert_rounds_like(found(net.to(device), latents.to(device), autocast=True), plain, exact)
