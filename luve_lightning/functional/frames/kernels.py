"""Triton kernels on bordered frames: causal convolution, norm with activation and its gradient, wide attention.

Imported on a GPU only. All work on frames stored channels last with one zero row below and one zero column to the
right of each (see the package): T x (H + 1) x (W + 1) x C, seen as a matrix of positions x channels. The border
serves as the padding of both sides: what lies left of column 0 is the column right of the row before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


# Sizes are not specialised: Triton would build every kernel anew for each divisibility of a size by 16, which gains
# nothing here and takes longer than a video at 2K takes to decode.
@triton.jit(do_not_specialize=("frame_rows", "row_length", "height", "width"))
def _convolve(
    windows,
    weights,
    weights2,
    out,
    bias,
    residual,
    frame_rows,
    row_length,
    height,
    width,
    CHANNELS: tl.constexpr,
    TIMES: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    ADD: tl.constexpr,
    DTYPE: tl.constexpr,
    TILES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Out[m] = bias + sum over taps of windows[m + tap's offset] @ weights of the tap (+ residual[m]), 0 at borders.

    A tile has BN channels in two PARTS, or BN + BN / 2 in three: 96 and 192 are no powers of two.
    """
    tile = tl.program_id(0)
    WIDE: tl.constexpr = BN // 2 * PARTS
    first, channel = (tile // TILES) * BM, (tile % TILES) * WIDE
    total = tl.zeros((BM, BN), tl.float32)
    rest = tl.zeros((BM, BN // 2), tl.float32)
    for i in range(TIMES * ROWS * STEPS):
        tap = i // STEPS
        row = first + (tap // ROWS) * frame_rows + (tap % ROWS) * row_length
        a = windows.load([row, (i % STEPS) * BK])
        total = tl.dot(a, weights.load([channel, i * BK]).T, total)
        if PARTS == 3:
            rest = tl.dot(a, weights2.load([channel + BN, i * BK]).T, rest)
    m = first + tl.arange(0, BM)
    place = m % frame_rows
    inside = ((place // row_length < height) & (place % row_length < width))[:, None]
    left, right = tl.split(total.reshape(BM, 2, BN // 2).permute(0, 2, 1))
    for i in tl.static_range(PARTS):  # a whole tile does not fit the registers beside what is added to it
        part = left if i == 0 else (right if i == 1 else rest)
        column = channel + i * (BN // 2)
        n = column + tl.arange(0, BN // 2)
        part += tl.load(bias + n, mask=n < CHANNELS, other=0.0).to(tl.float32)[None, :]
        if ADD:
            part += residual.load([first, column]).to(tl.float32)
        out.store([first, column], tl.where(inside, part, 0.0).to(DTYPE))


@triton.jit(do_not_specialize=("rows", "frame_rows", "row_length", "height", "width"))
def _activate(
    x,
    out,
    gamma,
    rows,
    frame_rows,
    row_length,
    height,
    width,
    scale,
    CHANNELS: tl.constexpr,
    ACTIVE: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """SiLU(x / |x| * scale * gamma) at each position, 0 at borders; without the SiLU unless ACTIVE."""
    m = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.arange(0, BC)
    place = m % frame_rows
    inside = (place // row_length < height) & (place % row_length < width) & (m < rows)
    at = m.to(tl.int64)[:, None] * CHANNELS + c[None, :]
    known = (c < CHANNELS)[None, :]
    v = tl.load(x + at, mask=inside[:, None] & known, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(v * v, 1))
    v = v * (scale / tl.maximum(length, 1e-12))[:, None]
    v *= tl.load(gamma + c, mask=c < CHANNELS, other=0.0).to(tl.float32)[None, :]
    if ACTIVE:
        v *= tl.sigmoid(v)
    tl.store(out + at, v, mask=(m < rows)[:, None] & known)


@triton.jit(do_not_specialize=("tokens",))
def _attend(q, k, v, out, tokens, scale, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """Softmax attention with heads of 3 x BD channels; q, k, v, out are frames x tokens x 3 BD, descriptors 2-D."""
    frame = tl.program_id(1)
    first = tl.program_id(0) * BM
    base = frame * tokens
    q0 = q.load([base + first, 0])
    q1 = q.load([base + first, BD])
    q2 = q.load([base + first, 2 * BD])
    o0 = tl.zeros((BM, BD), tl.float32)
    o1 = tl.zeros((BM, BD), tl.float32)
    o2 = tl.zeros((BM, BD), tl.float32)
    top = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, tokens, BN):
        row = base + start
        s = tl.dot(q0, k.load([row, 0]).T)
        s = tl.dot(q1, k.load([row, BD]).T, s)
        s = tl.dot(q2, k.load([row, 2 * BD]).T, s)
        n = start + tl.arange(0, BN)
        s = tl.where((n < tokens)[None, :], s * scale, -float("inf"))
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        keep = tl.exp2(top - new)
        total = total * keep + tl.sum(p, 1)
        top = new
        p = p.to(q0.dtype)
        o0 = tl.dot(p, v.load([row, 0]), o0 * keep[:, None])
        o1 = tl.dot(p, v.load([row, BD]), o1 * keep[:, None])
        o2 = tl.dot(p, v.load([row, 2 * BD]), o2 * keep[:, None])
    m = first + tl.arange(0, BM)
    at = (base + m).to(tl.int64)[:, None] * (3 * BD) + tl.arange(0, BD)[None, :]
    written = (m < tokens)[:, None]
    share = (1.0 / total)[:, None]
    tl.store(out + at, o0 * share, mask=written)
    tl.store(out + at + BD, o1 * share, mask=written)
    tl.store(out + at + 2 * BD, o2 * share, mask=written)


def _power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def tile_of(channels: int) -> tuple[int, int, int]:
    """How many channels of the output a program makes: BN, PARTS, and the number of programs beside each other.

    96 channels are in one tile of 128, of which a quarter is not used: alone that was faster than 64 + 32.
    """
    if channels % 192 == 0:
        return 128, 3, channels // 192
    wide = min(128, max(32, _power(channels)))
    return wide, 2, -(-channels // wide)


def step_of(window: int, itemsize: int) -> int:
    """How many values of a window are multiplied at once: 128 bytes, or half if that wastes less."""
    step = 128 // itemsize
    return step if -(-window // step) * step * 16 <= window * 17 else step // 2


def convolve(
    storage: Tensor,
    matrix: Tensor,
    bias: Tensor,
    out: Tensor,
    residual: Tensor | None,
    taps: tuple[int, int, int],
    base: int,
) -> None:
    """Convolve frames with a border; see `Convolution`.

    Args:
        storage: positions x channels, with what lies before the first frame and after the last.
        matrix: weights, channels x (times x rows x window), windows padded with zeros to whole steps.
        bias: float32, one per channel.
        out: where to write: T x (H + 1) x (W + 1) x channels.
        residual: added to the result, of the shape of `out`.
        taps: times, rows, and the length of a window in values of `storage`, padded.
        base: position in `storage` of the first tap for the first position of `out`.
    """
    times, rows, window = taps
    frames, height, width, channels = out.shape
    inputs = storage.shape[1]
    wide, parts, tiles = tile_of(channels)
    step = step_of(window, storage.element_size())
    tall = 256
    # As many steps in flight as shared memory holds.
    stages = 6 if step * storage.element_size() < 128 else 3 if parts == 3 else 4
    positions = frames * height * width
    seen = storage.shape[0] - -(-window // inputs) + 1

    def blocks(tensor: Tensor, columns: int) -> TensorDescriptor:
        return TensorDescriptor(tensor, [positions, channels], [channels, 1], [tall, columns])

    def weights(columns: int) -> TensorDescriptor:
        return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [columns, step])

    _convolve[(-(-positions // tall) * tiles,)](
        TensorDescriptor(storage[base:], [seen - base, window], [inputs, 1], [tall, step]),
        weights(wide),
        weights(wide // 2),
        blocks(out, wide // 2),
        bias,
        blocks(out if residual is None else residual, wide // 2),
        height * width,
        width,
        height - 1,
        width - 1,
        CHANNELS=channels,
        TIMES=times,
        ROWS=rows,
        STEPS=window // step,
        ADD=residual is not None,
        DTYPE=getattr(tl, str(out.dtype).removeprefix("torch.")),
        TILES=tiles,
        BM=tall,
        BN=wide,
        BK=step,
        PARTS=parts,
        num_warps=8,
        num_stages=stages,
    )


def activate(x: Tensor, gamma: Tensor, out: Tensor, active: bool) -> None:
    """Write RMS norm, times gamma, and SiLU if `active`, of frames with a border to `out`."""
    frames, height, width, channels = x.shape
    positions, block = frames * height * width, _power(channels)
    at_once = max(1, 4096 // block)
    _activate[(triton.cdiv(positions, at_once),)](
        x,
        out,
        gamma,
        positions,
        height * width,
        width,
        height - 1,
        width - 1,
        float(channels) ** 0.5,
        CHANNELS=channels,
        ACTIVE=active,
        BR=at_once,
        BC=block,
        num_warps=4,
    )


ATTENTION_WIDTH = 384  # one head of Wan2.1's VAE; flash kernels end at 256


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over frames x tokens x 384, each frame by itself; inputs may be slices of one tensor."""
    frames, tokens, width = q.shape
    tall, wide, third = 128, 32, width // 3
    out = torch.empty(frames, tokens, width, dtype=q.dtype, device=q.device)

    def rows(x: Tensor, count: int) -> TensorDescriptor:
        return TensorDescriptor(x, [frames * tokens, width], [x.stride(1), 1], [count, third])

    scale = width**-0.5 * 1.4426950408889634  # exp2 instead of exp
    _attend[(triton.cdiv(tokens, tall), frames)](
        rows(q, tall), rows(k, wide), rows(v, wide), out, tokens, scale, BM=tall, BN=wide, BD=third, num_warps=8,
        num_stages=2,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=("rows", "frame_rows", "row_length", "height", "width"))
def _activate_gradient(
    x,
    gamma,
    gradient,
    add,
    out,
    rows,
    frame_rows,
    row_length,
    height,
    width,
    scale,
    CHANNELS: tl.constexpr,
    ACTIVE: tl.constexpr,
    ADD: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """The gradient of `_activate` with respect to x (+ add), 0 at borders."""
    m = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.arange(0, BC)
    place = m % frame_rows
    inside = (place // row_length < height) & (place % row_length < width) & (m < rows)
    at = m.to(tl.int64)[:, None] * CHANNELS + c[None, :]
    seen = inside[:, None] & (c < CHANNELS)[None, :]
    v = tl.load(x + at, mask=seen, other=0.0).to(tl.float32)
    g = tl.load(gradient + at, mask=seen, other=0.0).to(tl.float32)
    factor = tl.load(gamma + c, mask=c < CHANNELS, other=0.0).to(tl.float32)[None, :] * scale
    inverse = (1.0 / tl.maximum(tl.sqrt(tl.sum(v * v, 1)), 1e-12))[:, None]
    if ACTIVE:
        n = v * inverse * factor
        s = tl.sigmoid(n)
        g *= s * (1 + n * (1 - s))
    g *= factor
    v *= inverse  # of length 1
    g = (g - v * tl.sum(g * v, 1)[:, None]) * inverse
    if ADD:
        g += tl.load(add + at, mask=seen, other=0.0).to(tl.float32)
    tl.store(out + at, tl.where(inside[:, None], g, 0.0), mask=(m < rows)[:, None] & (c < CHANNELS)[None, :])


def activate_gradient(x: Tensor, gamma: Tensor, gradient: Tensor, add: Tensor | None, active: bool) -> Tensor:
    """The gradient with respect to the input of `activate`, plus `add`; frames with a border."""
    frames, height, width, channels = x.shape
    positions, block = frames * height * width, _power(channels)
    at_once = max(1, 2048 // block)
    out = torch.empty_like(x)
    _activate_gradient[(triton.cdiv(positions, at_once),)](
        x,
        gamma,
        gradient,
        out if add is None else add,
        out,
        positions,
        height * width,
        width,
        height - 1,
        width - 1,
        float(channels) ** 0.5,
        CHANNELS=channels,
        ACTIVE=active,
        ADD=add is not None,
        BR=at_once,
        BC=block,
        num_warps=4,
    )
    return out
