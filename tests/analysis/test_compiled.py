"""The memory of compiled modules, against what PyTorch allocates for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luve_lightning.analysis.dry_run import dry_run, dry_training
from luve_lightning.analysis.training_plan import TrainingFunctions, run_backward


class Block(nn.Module):
    """A feed-forward as in a transformer: normed, scaled, wide, gated and added."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.wide, self.narrow = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.gate = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.wide(self.norm(x) * (1 + self.gate)), approximate="tanh")
        return x + self.narrow(hidden) * self.gate


WIDTH, HIDDEN = 48, 384


def net(trained: bool, device: str = "cpu") -> nn.Sequential:
    blocks = nn.Sequential(*(Block(WIDTH, HIDDEN) for _ in range(3))).to(device).requires_grad_(trained)
    blocks[0].gate.requires_grad_(True)  # type: ignore[union-attr]
    return blocks


def allocated(run: Callable[[], object]) -> int:
    """The most bytes that PyTorch's allocator held during a run, on the CPU."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    now = most = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def planned(trained: bool, compiled: bool, x: Tensor) -> tuple[int, int]:
    """The peaks of a training step and of a forward pass."""
    blocks = net(trained, "meta")
    compiles, latents = list(blocks) if compiled else [], x.to("meta")
    with dry_training(TrainingFunctions(None), compiles) as training:
        loss = blocks(latents).square().mean()
        training.compiled_backward = compiled
        run_backward(loss)
        del loss
    with dry_run(compiled=compiles) as passing:
        blocks(latents)
    return training.peak, passing.peak


@pytest.mark.parametrize("trained", [True, False])
def test_passes_take_the_memory_that_pytorch_allocates(trained: bool) -> None:
    x, real = torch.randn(1, 5000, WIDTH), net(trained)

    def step() -> None:
        real(x).square().mean().backward()
        real.zero_grad(set_to_none=True)

    measured = allocated(step), allocated(lambda: torch.no_grad()(real)(x))
    assert planned(trained, False, x) == pytest.approx(measured, rel=0.001)


def test_compiled_blocks_keep_what_cannot_be_computed_from_the_rest() -> None:
    x = torch.empty(1, 5000, WIDTH)
    narrow, wide = x.nbytes, x.nbytes // WIDTH * HIDDEN
    step, forward = planned(False, True, x)
    # The block's input, the hidden state, which is activated in place, and the second layer's output.
    assert forward == pytest.approx(wide + 2 * narrow, rel=0.001)
    # At the end of the forward pass, three hidden states before their activation and three outputs. Then the loss's
    # gradient, the same times the gate, and the last hidden state's gradient.
    assert step == pytest.approx(4 * wide + 5 * narrow, rel=0.01)
    # A trained layer's gradient needs the activated hidden state, too: it is kept.
    trained, _ = planned(True, True, x)
    assert step + 3 * wide <= trained < planned(True, False, x)[0]
