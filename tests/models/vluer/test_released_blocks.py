"""Window attention of the released VLUer: every habit of the original, against a form with one window at a time."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luve_lightning.models.vluer.released_blocks import BlockGroup, Fold, ReleasedBlock, relative_index, sine_positions
from tests.helpers.noise import noise

Size = tuple[int, int, int]
CHANNELS, HEADS = 12, 6


@cache
def plain_index(window: Size) -> Tensor:
    """The row of the table for each pair of tokens: frames, rows, columns apart, as digits."""
    tokens = list(itertools.product(*map(range, window)))
    index = torch.empty(len(tokens), len(tokens), dtype=torch.long)
    for (i, a), (j, b) in itertools.product(enumerate(tokens), repeat=2):
        t, y, x = (p - q + n - 1 for p, q, n in zip(a, b, window, strict=True))
        index[i, j] = (t * (2 * window[1] - 1) + y) * (2 * window[2] - 1) + x
    return index


def plain_positions(height: int, width: int, channels: int) -> Tensor:
    """Rows in the first half of the channels, columns in the second; sines at even channels, cosines at odd ones."""
    out = torch.empty(height, width, channels)
    half = channels // 2
    for y, x, c in itertools.product(range(height), range(width), range(channels)):
        place, n, k = (y, height, c) if c < half else (x, width, c - half)
        angle = (place + 1) / (n + 1e-6) * 2 * math.pi / 10000 ** (2 * (k // 2) / half)
        out[y, x, c] = math.cos(angle) if k % 2 else math.sin(angle)
    return out


def heads(x: Tensor) -> Tensor:
    """N x C to heads x N x width."""
    return x.unflatten(1, (HEADS, -1)).transpose(0, 1)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = heads(q) @ heads(k).transpose(1, 2) / math.sqrt(CHANNELS // HEADS) + bias
    return (scores.softmax(-1) @ heads(v)).transpose(0, 1).flatten(1)


def plain_attention(block: ReleasedBlock, x: Tensor, mask: Tensor, whole: Size, places: Tensor | None) -> Tensor:
    """One window, N x C; mutual attention is told the `places` of one frame's tokens."""
    attn, n = block.attn, len(x)
    bias = attn.relative_position_bias_table[plain_index(whole)[:n, :n]].permute(2, 0, 1)
    found = [softmax_attention(*attn.qkv_self(x).chunk(3, 1), bias + mask)]
    if places is not None:
        half = n // 2
        q, k, v = attn.qkv_mut(x + places.repeat(2, 1)).chunk(3, 1)
        corner = mask[:half, :half]
        first = softmax_attention(q[half:], k[:half], v[:half], corner)
        second = softmax_attention(q[:half], k[half:], v[half:], corner)
        found.insert(0, torch.cat((first, second)))
    return attn.proj(torch.cat(found, 1))


def plain_block(
    block: ReleasedBlock, x: Tensor, whole: Size, shifted: bool, masked: float = -100.0, places: Tensor | None = None
) -> Tensor:
    """One block on T x h x w x C: norm, zero padding, shift, one window after the other, and all of it undone."""
    grid = x.shape[:3]
    window = [min(n, w) for n, w in zip(grid, whole, strict=True)]
    shift = [w // 2 if shifted and n > w else 0 for n, w in zip(grid, whole, strict=True)]
    padded = [math.ceil(n / w) * w for n, w in zip(grid, window, strict=True)]
    y = torch.zeros(*padded, x.shape[3], dtype=x.dtype)
    y[: grid[0], : grid[1], : grid[2]] = block.norm1(x)
    y = y.roll([-s for s in shift], (0, 1, 2))
    regions = torch.zeros(padded, dtype=torch.long)
    for axis, (n, w, s) in enumerate(zip(padded, window, shift, strict=True)):
        if s:
            along = torch.tensor([0 if i < n - w else 1 if i < n - s else 2 for i in range(n)])
            regions = regions * 3 + along.view([-1 if a == axis else 1 for a in range(3)])
    out = torch.empty_like(y)
    for corner in itertools.product(*(range(0, n, w) for n, w in zip(padded, window, strict=True))):
        place = tuple(slice(c, c + w) for c, w in zip(corner, window, strict=True))
        region = regions[place].flatten()
        mask = torch.where(region[:, None] == region, 0.0, masked).to(x.dtype)
        out[place] = plain_attention(block, y[place].flatten(0, 2), mask, whole, places).view(*window, -1)
    out = out.roll(shift, (0, 1, 2))[: grid[0], : grid[1], : grid[2]]
    x = x + out
    mlp, y = block.mlp, block.norm2(x)
    return x + mlp.fc2(F.gelu(mlp.fc11(y)) * mlp.fc12(y))


def loud_group(window: Size, mutual: bool) -> BlockGroup:
    """Two blocks, the second shifted, whose scores differ by more than the mask takes off."""
    torch.manual_seed(0)
    group = BlockGroup(CHANNELS, 2, HEADS, window, mutual).double()
    for name, parameter in group.named_parameters():
        nn.init.normal_(parameter, std=60 if name.endswith("table") else 0.5)
        if "qkv" in name:
            parameter.data *= 8
    return group


GRIDS = {
    "windows as they are": (6, 8, 8),
    "padding on all axes": (7, 9, 10),
    "fewer frames": (3, 8, 16),
    "fewer rows and columns": (4, 3, 5),
    "fewer rows, more frames": (13, 2, 9),
}


@torch.no_grad()
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_self_attention_is_that_of_one_window_at_a_time(grid: Size) -> None:
    group, x = loud_group((6, 8, 8), mutual=False), noise(2, *grid, CHANNELS).double()
    for each, got in zip(x, group(x), strict=True):
        want = each
        for i, block in enumerate(group.blocks):
            want = plain_block(block, want, (6, 8, 8), i == 1)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(2, 8, 8), (3, 8, 12), (4, 17, 8)])
def test_mutual_attention_is_that_of_one_window_at_a_time(grid: Size) -> None:
    group, x = loud_group((2, 8, 8), mutual=True), noise(2, *grid, CHANNELS).double()
    assert group.positions is not None
    places = group.positions.flatten(0, 1)
    for each, got in zip(x, group(x), strict=True):
        want = each
        for i, block in enumerate(group.blocks):
            want = plain_block(block, want, (2, 8, 8), i == 1, places=places)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_mask_takes_off_100_and_not_everything() -> None:
    group, x = loud_group((6, 8, 8), mutual=False), noise(7, 9, 10, CHANNELS).double()
    by_100, by_all = (plain_block(group.blocks[1], x, (6, 8, 8), True, masked) for masked in (-100.0, -1e9))
    assert (by_100 - by_all).abs().max() > 0.1


def test_a_reduced_window_takes_the_corner_of_the_index() -> None:
    whole, own = plain_index((6, 8, 8)), plain_index((3, 8, 8))
    assert torch.equal(relative_index((6, 8, 8)), whole)
    # Fewer frames: the same differences, at other rows of the table than a window of that size would have.
    assert torch.equal(whole[:192, :192] - whole[0, 0], own - own[0, 0])
    # Fewer rows: the corner mixes differences up, and so does the original.
    small = plain_index((6, 2, 8))
    assert not torch.equal(whole[:96, :96] - whole[0, 0], small - small[0, 0])


@pytest.mark.parametrize("channels", [12, 120])
def test_positions_are_detrs(channels: int) -> None:
    torch.testing.assert_close(sine_positions(8, 8, channels), plain_positions(8, 8, channels), rtol=0, atol=3e-6)


def test_folding_orders_column_row_channel() -> None:
    x = torch.arange(2 * 4 * 6 * 3.0).view(1, 2, 4, 6, 3)
    folded = Fold("down")(x)
    assert folded.shape == (1, 2, 2, 3, 12)
    for row, column, channel in itertools.product(range(2), range(2), range(3)):
        assert torch.equal(folded[..., (column * 2 + row) * 3 + channel], x[:, :, row::2, column::2, channel])
    assert torch.equal(Fold("up")(folded), x)
    assert Fold("same")(x) is x
