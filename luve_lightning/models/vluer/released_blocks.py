"""The U-Net of the released VLUer: window attention over frames and rows, at four resolutions.

The architecture is the video restoration transformer's, VRT (arXiv 2201.12288, section 3), without its flow-guided
warping: seven stages at scales 1, 1/2, 1/4, 1/8, 1/4, 1/2 and 1, then groups of wider blocks. This is code of our own,
written from descriptions. Parameters have the names of the released state.

Everything here is channels last: B x T x h x w x C. Four habits of the original change numbers, and are kept:

- Frames, rows and columns are padded with zeros after the norm up to whole windows, and the padding is attended to.
- A window that is cut to a smaller grid of N tokens takes the corner [:N, :N] of the table's index, whichever axis was
  cut.
- Tokens that a shift has brought together from both ends attend to each other with 100 subtracted, not minus infinity.
- Mutual attention takes the mask's corner too, so it ignores a shift along time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luve_lightning.functional.interpolation import Size3d

MASKED = -100.0
_MOST_WINDOWS = 2**15  # sequences per call of attention: CUDA's kernels take fewer than 2**16


def relative_index(window: Size3d) -> Tensor:
    """The row of the table of position biases for each pair of a window's tokens.

    Returns:
        int64, N x N for a window of N = t * y * x tokens; values below (2t - 1)(2y - 1)(2x - 1).
    """
    positions = torch.cartesian_prod(*(torch.arange(n) for n in window))
    offsets = positions[:, None] - positions + torch.tensor(window) - 1
    _, rows, columns = (2 * n - 1 for n in window)
    return (offsets[..., 0] * rows + offsets[..., 1]) * columns + offsets[..., 2]


def sine_positions(height: int, width: int, channels: int) -> Tensor:
    """Sines and cosines of a window's rows and columns, as DETR has them (arXiv 2005.12872).

    Half the channels tell the row, half the column, each from just above 0 to 2 pi.

    Returns:
        float32, height x width x channels.
    """
    half = channels // 2
    wavelengths = 10000 ** (2 * (torch.arange(half, dtype=torch.float32) // 2) / half)

    def encode(n: int) -> Tensor:
        angles = torch.arange(1, n + 1, dtype=torch.float32) / (n + 1e-6) * 2 * math.pi
        angles = angles[:, None] / wavelengths
        return torch.stack((angles[:, 0::2].sin(), angles[:, 1::2].cos()), dim=2).flatten(1)

    rows, columns = encode(height)[:, None], encode(width)
    return torch.cat((rows.expand(-1, width, -1), columns.expand(height, -1, -1)), dim=2)


@dataclass(frozen=True)
class Windowing:
    """How a grid is cut into windows, which may be shifted.

    Attributes:
        grid: frames, rows and columns.
        window: extent of a window on this grid.
        shift: by how much windows are shifted; 0 along an axis of a single window.
    """

    grid: Size3d
    window: Size3d
    shift: Size3d

    @classmethod
    def on(cls, grid: Size3d, window: Size3d, shifted: bool) -> Windowing:
        """Windows of at most this size; an axis that fits into one is neither padded nor shifted."""
        fits = [n <= w for n, w in zip(grid, window, strict=True)]
        cut = [min(n, w) for n, w in zip(grid, window, strict=True)]
        shift = [0 if fit or not shifted else w // 2 for fit, w in zip(fits, window, strict=True)]
        return cls(grid, (cut[0], cut[1], cut[2]), (shift[0], shift[1], shift[2]))

    @property
    def tokens(self) -> int:
        """Tokens in a window."""
        return math.prod(self.window)

    def enter(self, x: Tensor) -> Tensor:
        """Pad with zeros to whole windows, and shift."""
        more = [-n % w for n, w in zip(self.grid, self.window, strict=True)]
        if any(more):
            x = F.pad(x, (0, 0, 0, more[2], 0, more[1], 0, more[0]))
        return torch.roll(x, [-s for s in self.shift], (1, 2, 3)) if any(self.shift) else x

    def leave(self, x: Tensor) -> Tensor:
        """Undo `enter`."""
        x = torch.roll(x, self.shift, (1, 2, 3)) if any(self.shift) else x
        return x[:, : self.grid[0], : self.grid[1], : self.grid[2]]

    def parts(self, padded: Sequence[int]) -> Iterator[tuple[tuple[slice, ...], tuple[bool, bool, bool]]]:
        """The parts of a shifted grid whose windows share one mask, and whether each axis is at its end there.

        Only the last window along a shifted axis holds tokens of both ends, so there are at most eight parts.
        """
        choices = [
            [(slice(None), False)] if s == 0 else [(slice(0, n - w), False), (slice(n - w, n), True)]
            for n, w, s in zip(padded, self.window, self.shift, strict=True)
        ]
        for (t, at_t), (y, at_y), (x, at_x) in itertools.product(*choices):
            yield (slice(None), t, y, x), (at_t, at_y, at_x)

    def mask(self, at_end: tuple[bool, bool, bool], device: torch.device) -> Tensor | None:
        """What is added to the scores of one part's windows, N x N; None for nothing."""
        if not any(at_end):
            return None
        sides = [
            (torch.arange(w, device=device) >= w - s) & end
            for w, s, end in zip(self.window, self.shift, at_end, strict=True)
        ]
        t, y, x = sides
        label = (t[:, None, None] * 4 + y[:, None] * 2 + x * 1).flatten()
        return (label[:, None] != label).to(torch.float32) * MASKED

    def split(self, x: Tensor) -> Tensor:
        """Cut B x T x h x w x C into windows, (windows) x N x C."""
        (t, y, x_), (batch, frames, height, width, channels) = self.window, x.shape
        x = x.view(batch, frames // t, t, height // y, y, width // x_, x_, channels)
        return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, self.tokens, channels)

    def join(self, windows: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo `split`, to B x T x h x w of `shape` and the windows' channels."""
        (t, y, x), (batch, frames, height, width) = self.window, shape[:4]
        windows = windows.view(batch, frames // t, height // y, width // x, t, y, x, -1)
        return windows.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, frames, height, width, -1)


class ReleasedAttention(nn.Module):
    """Self-attention in windows, and with `mutual` attention between the two frames of each window.

    Args:
        channels: C.
        heads: number of heads.
        window: extent of a whole window.
        mutual: also let each frame's tokens be asked for by the other's; `window` has two frames.
    """

    def __init__(self, channels: int, heads: int, window: Size3d, mutual: bool) -> None:
        super().__init__()
        self.heads, self.mutual, self.scale = heads, mutual, (channels // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.empty(math.prod(2 * n - 1 for n in window), heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv_self = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels * (1 + mutual), channels)
        if mutual:
            self.qkv_mut = nn.Linear(channels, 3 * channels)

    def forward(self, x: Tensor, windowing: Windowing, index: Tensor, positions: Tensor | None) -> Tensor:
        """Attend.

        Args:
            x: B x T x h x w x C, whole windows.
            windowing: how they lie.
            index: see `relative_index`, of a whole window.
            positions: see `sine_positions`, for mutual attention.

        Returns:
            The shape of `x`.
        """
        n = windowing.tokens
        bias = self.relative_position_bias_table[index[:n, :n]].permute(2, 0, 1)
        inputs = [(x, self.qkv_self)]
        if self.mutual:
            assert positions is not None
            _, rows, columns = windowing.window
            tiled = positions.to(x.dtype).repeat(x.shape[2] // rows, x.shape[3] // columns, 1)
            inputs.append((x + tiled, self.qkv_mut))
        projected = [F.linear(value, *self._wide(layer)) for value, layer in inputs]
        outputs = projected[0].new_empty(*x.shape[:4], len(inputs) * projected[0].shape[-1] // 3)
        for part, at_end in windowing.parts(x.shape[1:4]):
            mask = windowing.mask(at_end, x.device)
            windows = [windowing.split(value[part]) for value in projected]
            found = [self._attend(*self._heads(windows[0]), bias if mask is None else bias + mask)]
            if self.mutual:
                found.insert(0, self._exchange(windows[1], mask))
            outputs[part] = windowing.join(torch.cat(found, dim=2), outputs[part].shape)
        return F.linear(outputs, self._wide_input(), self.proj.bias)

    def _exchange(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """Mutual attention: where a frame's tokens are, what the other frame's tokens ask of it."""
        half = windows.shape[1] // 2
        query, key, value = (each.unflatten(2, (2, half)) for each in self._heads(windows))
        batch = len(query)
        # Windows x 2 frames x heads x N / 2 x width.
        query, key, value = (each.transpose(1, 2).flatten(0, 1) for each in (query.flip(2), key, value))
        found = self._attend(query, key, value, None if mask is None else mask[:half, :half])
        return found.view(batch, 2 * half, -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Windows x heads x N x width of each to windows x N x (heads * width)."""
        if bias is not None:  # in the queries' dtype: PyTorch 2.12's CPU kernel misreads another
            bias = bias.to(query.dtype).expand(1, self.heads, *bias.shape[-2:])
        chunks = zip(*(each.split(_MOST_WINDOWS) for each in (query, key, value)), strict=True)
        found = [F.scaled_dot_product_attention(q, k, v, bias, scale=self.scale) for q, k, v in chunks]
        return (found[0] if len(found) == 1 else torch.cat(found)).transpose(1, 2).flatten(2)

    def _heads(self, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = windows.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return query, key, value

    def _padding(self) -> int:
        """Zeros that make a head's width a multiple of 8, as fast kernels with a bias need. They change no product."""
        return -(self.qkv_self.in_features // self.heads) % 8

    def _wide(self, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weight and bias of a layer that gives queries, keys and values of padded heads."""
        more, weight, bias = self._padding(), layer.weight, layer.bias
        weight, bias = (each.unflatten(0, (3, self.heads, -1)) for each in (weight, bias))
        return F.pad(weight, (0, 0, 0, more)).flatten(0, 2), F.pad(bias, (0, more)).flatten()

    def _wide_input(self) -> Tensor:
        """The output projection's weight for padded heads."""
        weight = self.proj.weight.unflatten(1, (1 + self.mutual, self.heads, -1))
        return F.pad(weight, (0, self._padding())).flatten(1)


class GatedMLP(nn.Module):
    """fc2(GELU(fc11(x)) * fc12(x))."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc11 = nn.Linear(channels, hidden)
        self.fc12 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """... x C to the same shape."""
        return self.fc2(F.gelu(self.fc11(x)) * self.fc12(x))


class ReleasedBlock(nn.Module):
    """Attention in windows, then a gated MLP of twice the width; both residual, both after a norm."""

    def __init__(self, channels: int, heads: int, window: Size3d, mutual: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = ReleasedAttention(channels, heads, window, mutual)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = GatedMLP(channels, 2 * channels)

    def forward(self, x: Tensor, windowing: Windowing, index: Tensor, positions: Tensor | None) -> Tensor:
        """See ReleasedAttention."""
        windows = windowing.enter(self.norm1(x))
        x = x + windowing.leave(self.attn(windows, windowing, index, positions))
        return x + self.mlp(self.norm2(x))


class BlockGroup(nn.Module):
    """Blocks whose windows are shifted by half in every second one.

    Args:
        channels: C.
        blocks: their number.
        heads: heads of their attention.
        window: extent of a window.
        mutual: see ReleasedAttention.
    """

    index: Tensor
    positions: Tensor | None

    def __init__(self, channels: int, blocks: int, heads: int, window: Size3d, mutual: bool = False) -> None:
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList(ReleasedBlock(channels, heads, window, mutual) for _ in range(blocks))
        # The released state holds them once per block. They follow from the window, so they are not saved.
        self.register_buffer("index", relative_index(window), persistent=False)
        positions = sine_positions(window[1], window[2], channels) if mutual else None
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """B x T x h x w x C to the same shape."""
        grid = (x.shape[1], x.shape[2], x.shape[3])
        for i, block in enumerate(self.blocks):
            x = block(x, Windowing.on(grid, self.window, shifted=i % 2 == 1), self.index, self.positions)
        return x


class Fold(nn.Module):
    """Moves 2 x 2 neighbours into the channels ("down"), or back ("up"); "same" leaves all as it is.

    A neighbour's column counts before its row, and both before the channel.
    """

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        """B x T x h x w x C to B x T x h/2 x w/2 x 4C, or to B x T x 2h x 2w x C/4."""
        if self.way == "down":
            return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 1, 2, 4, 5, 3, 6).flatten(4)
        if self.way == "up":
            return x.unflatten(4, (2, 2, -1)).permute(0, 1, 2, 5, 3, 4, 6).flatten(4, 5).flatten(2, 3)
        return x


class ScaleStage(nn.Module):
    """One scale: a change of resolution, blocks with mutual attention, blocks without."""

    def __init__(self, way: str, channels: int, heads: int, blocks: tuple[int, int], window: Size3d) -> None:
        super().__init__()
        folded = {"same": channels, "down": 4 * channels, "up": channels // 4}[way]
        layers = [Fold(way), nn.LayerNorm(folded)]
        self.reshape = nn.Sequential(*layers, *([] if way == "same" else [nn.Linear(folded, channels)]))
        self.residual_group1 = BlockGroup(channels, blocks[0], heads, (2, *window[1:]), mutual=True)
        self.linear1 = nn.Linear(channels, channels)
        self.residual_group2 = BlockGroup(channels, blocks[1], heads, window)
        self.linear2 = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """B x T x h x w x C to this scale's grid."""
        x = self.reshape(x)
        x = x + self.linear1(self.residual_group1(x))
        return x + self.linear2(self.residual_group2(x))


class DeepGroup(nn.Module):
    """Blocks and a linear layer, residual."""

    def __init__(self, channels: int, blocks: int, heads: int, window: Size3d) -> None:
        super().__init__()
        self.residual_group = BlockGroup(channels, blocks, heads, window)
        self.linear = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """B x T x h x w x C to the same shape."""
        return x + self.linear(self.residual_group(x))
