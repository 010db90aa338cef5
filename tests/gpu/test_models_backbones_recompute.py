"""What is recomputed or kept on the host: the same numbers on a GPU, by its attention kernels, in less memory."""

from __future__ import annotations

import gc
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from luve_lightning.models.backbones import Denoiser, denoiser_of
from luve_lightning.models.backbones.recompute import _ATTENTION
from tests.helpers.gpu import BF16, DEVICE, FLOAT32, error
from tests.helpers.wide_wan import ATTENTIONS, LONG, SIZES, wide_inputs, wide_transformer

CALLS = {"own": (1, 1, 1), "windows": (2, 1, 2), "tiles": (1, 1, 1)}  # of attention in each block
BLOCKS, TOKENS = SIZES["num_layers"], prod(LONG) // 4
OPTIONS: dict[str, dict[str, Any]] = {
    "blocks": {"recompute": "blocks"},
    "attention kept": {"recompute": "all_but_attention"},
    "attention of one block kept": {"recompute": "all_but_attention", "keep_attention": 1},
    "on the host": {"recompute": "blocks", "offload": True},
    "attention kept, the rest on the host, in chunks": {
        "recompute": "all_but_attention", "offload": True, "chunks": 3,
    },
}  # fmt: skip


class SelfAttentions(TorchDispatchMode):
    """Counts the calls of the kernels that selective recomputation knows, by tokens that attend to as many."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _ATTENTION and args[0].shape[-2] == args[1].shape[-2]:
            self.count += 1
        return func(*args, **(kwargs or {}))


def prepared(kind: str, device: torch.device, options: dict[str, Any]) -> Denoiser:
    denoiser = denoiser_of(wide_transformer(ATTENTIONS[kind]).train().to(device))
    denoiser.set_recompute(**options)
    return denoiser


def loss_of(denoiser: Denoiser, half: bool) -> Tensor:
    device = denoiser.module.device
    latents, timestep, text = (x.to(device) for x in wide_inputs(1, LONG))
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        return (denoiser.velocity(latents, timestep, text).float() - latents).square().mean()


def step(kind: str, device: torch.device, half: bool, **options: Any) -> tuple[list[Tensor], int, int]:
    """Loss and gradients, and how often self-attention ran in the two passes."""
    denoiser = prepared(kind, device, options)
    forward, backward = SelfAttentions(), SelfAttentions()
    with forward:
        loss = loss_of(denoiser, half)
    with backward:
        loss.backward()
    return [loss.detach(), *(p.grad for p in denoiser.module.parameters())], forward.count, backward.count


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("half", [True, False], ids=["bf16", "float32"])
@pytest.mark.parametrize("kind", CALLS)
def test_numbers_stay_and_attention_is_kept(device: torch.device, kind: str, half: bool) -> None:
    if DEVICE.type == "cpu" and kind == "tiles":
        pytest.skip("on a CPU, Tiles attend by a mask")
    calls = CALLS[kind]
    want, forward, again = step(kind, device, half, recompute="nothing")
    assert (forward, again) == (sum(calls), 0), "fewer: a kernel that recomputation does not know"
    for name, options in OPTIONS.items():
        got, first, repeated = step(kind, device, half, **options)
        kept = options.get("keep_attention", BLOCKS) if options["recompute"] == "all_but_attention" else 0
        assert (first, repeated) == (sum(calls), sum(calls[kept:])), name
        # Kernels' gradients add up with atomic operations, in another order each time; chunks of a feed-forward add
        # those of its weights up in bfloat16.
        assert error(got, want) < (BF16 / 2 if half else FLOAT32), name


@pytest.mark.only_gpu
@pytest.mark.parametrize("recompute", ["blocks", "all_but_attention"])
def test_inputs_on_the_host_leave_the_gpu(device: torch.device, recompute: str) -> None:
    """All but the last block's, which the backward pass needs at once."""

    def requested() -> int:
        gc.collect()  # what an earlier step left must not go during a later one
        # Not `memory_allocated`: that counts up to 1 MiB more for a tensor in a freed place that is left undivided.
        return int(torch.cuda.memory_stats()["requested_bytes.all.current"])

    def held(offload: bool) -> int:
        denoiser = prepared("own", device, {"recompute": recompute, "offload": offload})
        before = requested()
        loss = loss_of(denoiser, True)
        torch.cuda.synchronize()
        found = requested() - before
        loss.backward()
        assert all(bool(p.grad.isfinite().all()) for p in denoiser.module.parameters())
        return found

    held(False)  # libraries allocate their workspace once
    width = SIZES["num_attention_heads"] * SIZES["attention_head_dim"]
    one = TOKENS * width * 2  # bytes of a block's input in bfloat16
    assert held(False) - held(True) >= (BLOCKS - 1) * one
