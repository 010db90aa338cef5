"""`luve bench --subject attention`: self-attention of one layer, dense and sparse, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from luve_lightning.functional.frequency import Grid
from luve_lightning.machine import measure_ms, measure_peak_mib
from luve_lightning.models.attention import Attention, Where
from luve_lightning.models.attention.dense import Dense
from luve_lightning.models.attention.tiles import Tiles
from luve_lightning.models.attention.windows import Windows

# The cycles of experiments/experts/adaptation-{2k,4k}-windows.yaml, and T3-Video's own of experiments/generate/t3.yaml.
CUTS: dict[str, tuple[Grid, ...]] = {
    "2k": ((13, 1, 1), (1, 4, 8), (4, 2, 4), (1, 4, 10), (7, 1, 5)),
    "4k": ((13, 1, 1), (1, 8, 12), (4, 4, 6), (1, 8, 15), (7, 4, 4)),
    "t3": ((21, 1, 1), (1, 17, 30), (1, 8, 40), (3, 17, 8), (7, 8, 6)),
}
_GRIDS: dict[str, Grid] = {"2k": (13, 92, 160), "4k": (13, 136, 240)}


def kinds(size: str) -> dict[str, Attention]:
    """What is measured, by name."""
    cuts = CUTS[size] if size in CUTS else CUTS["2k"]
    return {
        "dense": Dense(),
        "windows": Windows(cuts),
        "windows, linear": Windows(cuts, linear=True),
        "windows, alternate": Windows(cuts, "alternate"),
        "windows of T3-Video": Windows(CUTS["t3"]),
        "tiles 4x8x8, nearest 4x3x3": Tiles((4, 8, 8), (4, 3, 3)),
        "tiles 4x8x8, nearest 4x3x3, linear": Tiles((4, 8, 8), (4, 3, 3), linear=True),
        "tiles 4x8x8, nearest 4x5x5": Tiles((4, 8, 8), (4, 5, 5)),
    }


def _period(attention: Attention) -> int:
    """After how many layers the attention is the same again."""
    if not isinstance(attention, Windows):
        return 1
    return len(attention.cuts) * (2 if attention.ways == "alternate" else 1)


def measure(
    device: torch.device, repeats: int = 3, size: str | None = None, only: str = "", backward: bool = True
) -> Iterator[dict[str, Any]]:
    """Time self-attention of one layer of Wan2.1-1.3B, without the projections around it.

    Args:
        device: a GPU runs 12 heads x 128 in bfloat16, a CPU 2 heads x 16 in float32 on a small grid.
        repeats: timed runs after one that compiles and chooses kernels; the least time counts.
        size: "2k" or "4k", at 49 frames, on a GPU; None is both.
        only: measure the kinds whose name begins so.
        backward: whether to time the backward pass too.

    Yields:
        One row for each size and kind: milliseconds of the forward and of forward and backward together, a mean over
        the layers whose cost differs; the share of all pairs of tokens; TFLOP/s of the forward pass by the pairs
        that are needed; peak MiB that forward and backward add.

    Raises:
        ValueError: for another size.
    """
    sizes, heads, width, dtype = _GRIDS, 12, 128, torch.bfloat16
    if device.type == "cpu":
        sizes, heads, width, dtype = {"small": (3, 12, 10)}, 2, 16, torch.float32
    if size is not None and size not in sizes:
        raise ValueError(f"size {size}: expected one of {', '.join(sizes)}")
    for name in sizes if size is None else [size]:
        for kind, attention in kinds(name).items():
            if kind.startswith(only):
                row = {"subject": "attention", "size": name, "tokens": prod(sizes[name]), "attention": kind}
                shape = (1, prod(sizes[name]), heads, width)
                yield row | _measure(attention, sizes[name], shape, dtype, device, repeats, backward)


def _measure(
    attention: Attention,
    grid: Grid,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    backward: bool,
) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)
    query, key, value, gradient = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4)
    )
    inputs = [x.requires_grad_() for x in (query, key, value)]
    branch = attention.branch(*shape[2:])
    if branch is not None:
        branch.to(device, dtype)
        for parameter in branch.parameters():
            nn.init.normal_(parameter, std=0.02)  # fast kernels must not be timed on zeros
    forward, both, peaks = [], [], []
    layers = _period(attention)
    for layer in range(layers):
        run = _Layer(attention, inputs, gradient, Where(grid, layer), branch)
        forward.append(_least_ms(run.forward, device, repeats))
        if backward:
            both.append(_least_ms(run.forward_and_backward, device, repeats))
            peaks.append(measure_peak_mib(run.forward_and_backward, device))
    pairs = sum(attention.pairs(grid, layer, 0.0) for layer in range(layers)) / layers
    ms = sum(forward) / layers
    row = {
        "forward_ms": round(ms, 3),
        "forward_ms_by_layer": [round(one, 3) for one in forward],
        "pairs_percent": round(100 * pairs / prod(grid) ** 2, 3),
        "tflops": round(4 * pairs * prod(shape[2:]) / ms / 1e9, 1),
    }
    if backward:
        row["forward_and_backward_ms"] = round(sum(both) / layers, 3)
        row["forward_and_backward_ms_by_layer"] = [round(one, 3) for one in both]
        row["peak_mib"] = round(max(peaks), 1)
    return row


@dataclass(frozen=True)
class _Layer:
    """One layer's attention with its inputs, and the gradient of its output."""

    attention: Attention
    inputs: list[Tensor]
    gradient: Tensor
    where: Where
    branch: nn.Module | None

    def forward(self) -> None:
        with torch.no_grad():
            self._output()

    def forward_and_backward(self) -> None:
        output = self._output()
        parameters = [] if self.branch is None else list(self.branch.parameters())
        torch.autograd.grad(output, [*self.inputs, *parameters], self.gradient)

    def _output(self) -> Tensor:
        query, key, value = self.inputs
        return self.attention(query, key, value, self.where, self.branch)


def _least_ms(run: Callable[[], None], device: torch.device, repeats: int) -> float:
    run()
    return min(measure_ms(run, device)[1] for _ in range(repeats))
