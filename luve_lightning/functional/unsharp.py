"""Unsharp masking of videos."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

_TRUNCATE = 4.0  # unsharp masking's kernel ends 4 sigma from its centre, the default of skimage and scipy
_BLOCK = 64  # pixels that one matrix product yields along its axis; 32 to 128 are within 20 % of each other
# Values that unsharp masking processes at once: on a CPU what its caches hold, elsewhere enough to fill the device.
_CPU_VALUES = 2**21
_DEVICE_VALUES = 2**26


@torch.no_grad()
def unsharp_mask(video: Tensor, radius: float, amount: float) -> Tensor:
    """Sharpen every frame: x + amount * (x - blurred x), clamped (LuVe, arXiv 2602.11564, the HFE's data).

    Equal to `skimage.filters.unsharp_mask` channel by channel on frames scaled to [0, 1]: a Gaussian cut off 4
    sigma from its centre, edges mirrored with the outermost pixel repeated. Computed in float32, even under
    autocast. A clip's result does not depend on the other clips in the batch, to the bit.

    Args:
        video: B x C x T x H x W in [-1, 1], floating point; not modified.
        radius: sigma of the Gaussian in pixels, > 0.
        amount: share of the removed detail to add; 0 only clamps, negative values blur.

    Returns:
        A new tensor of the shape, dtype and device of `video`, in [-1, 1], without gradient.

    Raises:
        ValueError: another rank, a type that is not floating point, radius <= 0, or a number that is not finite.
    """
    if video.ndim != 5 or not video.is_floating_point():
        kind = str(video.dtype).removeprefix("torch.")
        raise ValueError(f"video: expected floating point B x C x T x H x W, got {kind} {tuple(video.shape)}")
    check_unsharp(radius, amount)
    sharp = torch.empty_like(video, memory_format=torch.contiguous_format)
    if video.numel() == 0:
        return sharp
    height, width = video.shape[3:]
    rows, columns = _blocks(height, radius, video.device), _blocks(width, radius, video.device)
    # Autocast would run matrix products in bfloat16, whose 8 bits are no more than a level's.
    # What is only counted, on the meta device, has no autocast.
    with nullcontext() if video.is_meta else torch.autocast(video.device.type, enabled=False):
        # Clip by clip: the rounding of a matrix product may change with its size.
        for clip, target in zip(video, sharp, strict=True):
            _sharpen_planes(clip.reshape(-1, height, width), target.view(-1, height, width), rows, columns, amount)
    return sharp


def check_unsharp(radius: float, amount: float) -> None:
    """Refuse meaningless parameters of `unsharp_mask`, naming what is wrong."""
    if not 0 < radius < math.inf:
        raise ValueError(f"radius: expected the Gaussian's sigma in pixels, > 0 and finite, got {radius}")
    if not math.isfinite(amount):
        raise ValueError(f"amount: expected a finite number, got {amount}")


@dataclass(frozen=True)
class _Block:
    """A blur along one axis: pixels [start, stop) are `weights` times pixels [low, high)."""

    start: int
    stop: int
    low: int
    high: int
    weights: Tensor


def _blocks(length: int, radius: float, device: torch.device) -> list[_Block]:
    """The blur along an axis of `length` pixels as matrices, with the mirrored edges folded in.

    Unlike convolutions of one channel, matrix products run at full speed on every device. They need no padding: an
    axis shorter than the kernel is mirrored as often as it takes.
    """
    reach = int(_TRUNCATE * radius + 0.5)
    taps = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (taps / radius) ** 2)
    kernel /= kernel.sum()
    blocks: list[_Block] = []
    inner: Tensor | None = None
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        low, high = max(0, start - reach), min(length, stop + reach)
        is_inner = high - low == _BLOCK + 2 * reach
        if is_inner and inner is not None:
            weights = inner
        else:
            source = (torch.arange(start, stop)[:, None] + torch.arange(-reach, reach + 1)) % (2 * length)
            source = torch.minimum(source, 2 * length - 1 - source)
            folded = torch.zeros(stop - start, high - low, dtype=torch.float64)
            folded.scatter_add_(1, source - low, kernel.expand(stop - start, -1))
            weights = folded.float().to(device)
            inner = weights if is_inner else inner
        blocks.append(_Block(start, stop, low, high, weights))
    return blocks


def _sharpen_planes(planes: Tensor, target: Tensor, rows: list[_Block], columns: list[_Block], amount: float) -> None:
    """Sharpen N x H x W into `target`, a few planes or a band of one plane at a time."""
    height, width = planes.shape[1:]
    at_once = _CPU_VALUES if planes.device.type == "cpu" else _DEVICE_VALUES
    count = max(1, min(len(planes), at_once // (height * width)))
    # Neighbouring blocks of rows, together at most that many pixels high unless one alone is larger.
    size = max(1, (height if count > 1 else max(1, at_once // width)) // _BLOCK)
    bands = [rows[first : first + size] for first in range(0, len(rows), size)]
    tallest = max(band[-1].stop - band[0].start for band in bands)
    buffers = torch.empty(2, count * tallest * width, device=planes.device)
    for first in range(0, len(planes), count):
        part = planes[first : first + count].float()
        for band in bands:
            top, bottom = band[0].start, band[-1].stop
            shape = (len(part), bottom - top, width)
            half, blurred = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
            for row in band:
                weights = row.weights.expand(len(part), -1, -1)
                torch.bmm(weights, part[:, row.low : row.high], out=half[:, row.start - top : row.stop - top])
            lines, blurred_lines = half.view(-1, width), blurred.view(-1, width)
            for column in columns:
                torch.mm(
                    lines[:, column.low : column.high],
                    column.weights.mT,
                    out=blurred_lines[:, column.start : column.stop],
                )
            # Away from the blurred frame, past the original.
            torch.lerp(part[:, top:bottom], blurred, -amount, out=blurred)
            target[first : first + count, top:bottom] = blurred.clamp_(-1, 1)
