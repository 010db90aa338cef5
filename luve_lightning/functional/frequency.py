"""Low- and high-pass filters over the token grid (T, h, w) of a video transformer.

LuVe (arXiv 2602.11564) filters tokens before its experts' LoRA but publishes neither cutoff, window nor axes, so
all three are arguments here. Frequencies are those of the discrete Fourier transform, so an axis continues
periodically at its ends. A low-pass response is the product of one response per axis, so it can be applied as one
small matrix per axis (`filter_tokens`). A high-pass is the input minus its low-pass: the two add up to the input.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

FilterBand = Literal["low", "high"]
FilterWindow = Literal["ideal", "gaussian", "butterworth"]
GridAxis = Literal["t", "h", "w"]
Grid = tuple[int, int, int]

_AXES = get_args(GridAxis)


@dataclass(frozen=True)
class FrequencyFilter:
    """Which frequencies of a token grid pass.

    Attributes:
        band: "low" keeps frequencies below the cutoff on every filtered axis, "high" the rest.
        cutoff: fraction of the Nyquist frequency (half a cycle per token), in [0, 1]. "ideal" passes frequencies
            up to and including it; the smooth windows halve the power there. At 0 a low-pass passes only the mean.
        axes: axes to filter along; the others pass unchanged.
        window: "ideal" (a box; it rings), "gaussian" (no ringing) or "butterworth" (in between).
        order: order of the Butterworth window, >= 1; higher is steeper.
    """

    band: FilterBand
    cutoff: float
    axes: tuple[GridAxis, ...] = ("h", "w")
    window: FilterWindow = "ideal"
    order: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", tuple(self.axes))  # configuration files give lists
        if self.band not in get_args(FilterBand):
            raise ValueError(f"filter band {self.band!r}: expected low or high")
        if self.window not in get_args(FilterWindow):
            raise ValueError(f"filter window {self.window!r}: expected ideal, gaussian or butterworth")
        if not 0 <= self.cutoff <= 1:
            raise ValueError(f"filter cutoff {self.cutoff}: expected a fraction of Nyquist from 0 to 1")
        if not self.axes or len(set(self.axes)) < len(self.axes) or not set(self.axes) <= set(_AXES):
            raise ValueError(f"filter axes {self.axes}: expected one or more of t, h, w, each once")
        if int(self.order) != self.order or self.order < 1:
            raise ValueError(f"filter order {self.order}: expected an integer >= 1")

    def response(self, length: int, device: torch.device | None = None) -> Tensor:
        """Low-pass gain along one axis at the transform's frequencies, also for band "high".

        Args:
            length: number of tokens along the axis.
            device: device of the result.

        Returns:
            float64, shape (length,), in the order of `torch.fft.fftfreq`; 1 at frequency 0, in [0, 1] elsewhere.
        """
        k = torch.arange(length, device=device)
        # Distance to frequency 0 in units of Nyquist.
        frequency = torch.minimum(k, length - k).double() * 2 / length
        if self.window == "ideal" or self.cutoff == 0:
            # A cutoff such as 1/3 must not lose its own frequency to rounding.
            return (frequency <= self.cutoff + 1e-9).double()
        ratio = frequency / self.cutoff
        if self.window == "gaussian":
            return torch.exp(-math.log(2) / 2 * ratio**2)
        return (1 + ratio ** (2 * self.order)).rsqrt()

    def lowpass_matrix(self, length: int, device: torch.device | None = None) -> Tensor:
        """The low-pass along one axis as a matrix that multiplies a column of tokens.

        Returns:
            float64, (length, length), symmetric and circulant.
        """
        k = torch.arange(length, device=device)
        # Whole turns are removed in integers: exact for every length.
        angle = 2 * math.pi / length * (k[:, None] * k % length).double()
        kernel = angle.cos() @ self.response(length, device) / length
        return kernel[(k[:, None] - k) % length]

    def matrices(
        self, grid: Grid, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor | None, ...]:
        """`lowpass_matrix` for each axis of a grid (T, h, w), None for axes that are not filtered."""
        return tuple(
            self.lowpass_matrix(length, device).to(dtype) if axis in self.axes else None
            for axis, length in zip(_AXES, grid, strict=True)
        )


def filter_tokens(
    tokens: Tensor, grid: Grid, frequency_filter: FrequencyFilter, matrices: tuple[Tensor | None, ...] | None = None
) -> Tensor:
    """Tokens filtered along the axes of their grid, with one matrix per axis.

    Computed in float32 (float64 stays), whatever the input's dtype and autocast: a high-pass is a difference of
    nearly equal numbers, which bfloat16 would reduce to noise. The copy is cheap for the few channels of a LoRA's
    rank.

    Args:
        tokens: B x (T*h*w) x C, in row-major order of the grid.
        grid: number of tokens along time, height, width.
        frequency_filter: the frequencies to pass.
        matrices: `frequency_filter.matrices(grid, tokens.device)`, for callers that filter one grid often.

    Returns:
        The shape and dtype of `tokens`.

    Raises:
        ValueError: when the tokens do not fill the grid.
    """
    if tokens.ndim != 3 or len(grid) != 3 or tokens.shape[1] != math.prod(grid):
        raise ValueError(f"tokens of shape {tuple(tokens.shape)} are not B x (T*h*w) x C of grid {tuple(grid)}")
    batch, _, channels = tokens.shape
    with _without_autocast(tokens.device):
        values = tokens if tokens.dtype == torch.float64 else tokens.float()
        if matrices is None:
            matrices = frequency_filter.matrices(grid, tokens.device, values.dtype)
        low = values
        before, after = batch, math.prod(grid) * channels
        for length, matrix in zip(grid, matrices, strict=True):
            after //= length
            if matrix is not None:
                # bmm, not matmul: matmul would fold the batch by copying the tokens there and back.
                low = torch.bmm(matrix.to(values.dtype).expand(before, -1, -1), low.reshape(before, length, after))
            before *= length
        low = low.reshape(tokens.shape)
        passed = low if frequency_filter.band == "low" else values - low
        return passed.to(tokens.dtype)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off, except for tensors without values (device "meta"), which do not support it."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
