"""Causal layers on frames stored channels last with a border, which remember the frames before.

A video VAE's layers spend more than half of the time around their convolutions: padding, concatenating the past, norms
in several passes, bias. Here frames are stored channels last with one zero row below and one zero column to the right
of each, T x (H + 1) x (W + 1) x C ("bordered"). That border pads both sides, since what lies left of column 0 is the
border of the row before. The two frames on which a causal convolution looks back stand before them in the same
storage. A convolution of kernel 3 along the width then reads three neighbouring positions, which are contiguous, and
the whole is one matrix product with shifted rows. On a GPU one Triton kernel does that, with bias and residual sum,
and another one norm and SiLU (`kernels`); elsewhere PyTorch's operations do, which defines the numbers.

For gradients, a layer keeps its input and computes what it needs again. The gradient of a causal convolution is one
with the weights transposed and mirrored that looks ahead: the same kernel, with two frames of zeros after the clip
instead of the past before it. The border of a gradient is zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_SHARED_MEMORY = 200 * 2**10  # bytes that the largest tile takes

Past = dict[int, Tensor]  # frames that a layer looks back on, by the layer's id


class FrameLayer(Protocol):
    """From the next frames to the next frames, bordered."""

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        """The next frames; `past` is updated, and `x` may be written over."""
        ...


def bordered(frames: int, height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """Frames of zeros with a border."""
    return like.new_zeros(frames, height + 1, width + 1, channels)


def inside(x: Tensor) -> Tensor:
    """The frames without their border, T x H x W x C."""
    return x[:, :-1, :-1]


def uses_kernels(x: Tensor) -> bool:
    """Whether a tensor goes through the Triton kernels."""
    return x.is_cuda


def kernels_suit(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether they are the fast way there: in half precision on a GPU of Hopper's kind or later.

    The meta device stands for such a GPU.
    """
    if device.type not in ("cuda", "meta") or dtype not in (torch.bfloat16, torch.float16):
        return False
    if device.type == "meta":
        return True
    if find_spec("triton") is None:
        return False
    properties = torch.cuda.get_device_properties(device)
    # AMD's GPUs, which PyTorch calls cuda too, do not tell the second.
    return properties.major >= 9 and getattr(properties, "shared_memory_per_block_optin", 0) >= _SHARED_MEMORY


@contextmanager
def keeping() -> Iterator[None]:
    """For weights that are kept: made in inference mode, they could not take part in a gradient later."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Norm:
    """RMS norm over channels, with SiLU unless it serves attention.

    Args:
        gamma: scale of each channel.
        active: whether SiLU follows.
        dtype: dtype of the frames.
    """

    def __init__(self, gamma: Tensor, active: bool, dtype: torch.dtype) -> None:
        self.gamma = gamma.detach().flatten().to(torch.promote_types(dtype, torch.float32))
        self.active = active

    @classmethod
    def of(cls, module: Any, dtype: torch.dtype, active: bool = True) -> Norm:
        """The norm of a module with a `gamma`."""
        return cls(module.gamma, active, dtype)

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """Write to `out`; bordered."""
        if x.is_meta:  # counted as what the kernel reads and writes; it allocates nothing
            out.copy_(x)
            return
        if uses_kernels(x):
            from luve_lightning.functional.frames import kernels

            kernels.activate(x, self.gamma, out, self.active)
            return
        out.copy_(self.values(x))

    def values(self, x: Tensor) -> Tensor:
        """The same by PyTorch's operations, in float32 at least."""
        y = F.normalize(x.to(self.gamma.dtype), dim=-1) * x.shape[-1] ** 0.5 * self.gamma
        return F.silu(y) if self.active else y

    def gradient(self, x: Tensor, gradient: Tensor, add: Tensor | None = None) -> Tensor:
        """The gradient with respect to the input, plus `add`; bordered."""
        if uses_kernels(x):
            from luve_lightning.functional.frames import kernels

            return kernels.activate_gradient(x, self.gamma, gradient, add, self.active)
        if x.is_meta:  # counted as what the kernel reads and allocates
            return torch.add(x, gradient) if add is None else torch.addcmul(add, x, gradient)
        with torch.enable_grad():
            seen = inside(x).detach().requires_grad_()
            [found] = torch.autograd.grad(self.values(seen), seen, inside(gradient).to(self.gamma.dtype))
        result = bordered(x.shape[0], x.shape[1] - 1, x.shape[2] - 1, x.shape[3], x)
        inside(result).copy_(found if add is None else found + inside(add))
        return result


class Convolution:
    """A causal convolution of stride 1 on bordered frames, after a norm if there is one; input and output bordered.

    Args:
        weight: of a Conv3d of kernel 3 x 3 x 3 or 3 x 1 x 1, or of a Conv2d of kernel 3 x 3.
        bias: one per channel, or None.
        dtype: dtype of the weights here.
        norm: before it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, norm: Norm | None = None) -> None:
        self.source = weight  # the module's own, so that it takes no memory
        weight = weight.detach()
        weight = weight.unsqueeze(2) if weight.ndim == 4 else weight
        self.norm, self.channels = norm, weight.shape[0]
        self.times, self.rows = weight.shape[2], weight.shape[3]
        self.before = self.times - 1
        unit = 8 if uses_kernels(weight.to(dtype)) else 1  # kernels move 16 bytes
        inputs, outputs = (-(-n // unit) * unit for n in (weight.shape[1], weight.shape[0]))
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, inputs - weight.shape[1], 0, outputs - weight.shape[0]))
        self.inputs, self.outputs = inputs, outputs
        self.weight, self.dtype = weight.to(dtype), dtype
        bias = weight.new_zeros(outputs) if bias is None else bias.detach()
        self.bias = F.pad(bias, (0, outputs - bias.shape[0])).to(torch.promote_types(dtype, torch.float32))
        self.matrix: Tensor | None = None
        self.window = inputs * weight.shape[4]
        if uses_kernels(self.weight):
            from luve_lightning.functional.frames.kernels import step_of

            step = step_of(self.window, self.weight.element_size())
            # channels x times x rows x (columns x inputs)
            rows = self.weight.permute(0, 2, 3, 4, 1).flatten(3)
            self.window = -(-self.window // step) * step
            self.matrix = F.pad(rows, (0, self.window - rows.shape[3])).flatten(1).contiguous()
            self.weight = self.matrix

    @classmethod
    def of(cls, module: nn.Conv2d | nn.Conv3d, dtype: torch.dtype, norm: Norm | None = None) -> Convolution:
        """The convolution of a module."""
        return cls(module.weight, module.bias, dtype, norm)

    def storage(self, frames: int, height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Room for frames and what they look back on, T + 2 with border: positions x channels, and as frames."""
        lead, tail = width + 2, 4
        size = (frames + self.before) * (height + 1) * (width + 1)
        storage = like.new_empty(lead + size + tail, self.inputs, dtype=like.dtype)
        storage[:lead].zero_()
        storage[-tail:].zero_()
        return storage, storage[lead:-tail].view(frames + self.before, height + 1, width + 1, self.inputs)

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        """The convolution of the next frames; `past` is updated."""
        return self.run(*self.fill(x, past))

    def fill(self, x: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        """The storage of the next frames, normed, after those that they look back on."""
        frames, height, width = x.shape[0], x.shape[1] - 1, x.shape[2] - 1
        storage, all_frames = self.storage(frames, height, width, x)
        if self.norm is None:
            all_frames[self.before :].copy_(x)
        else:
            self.norm(x, all_frames[self.before :])
        if self.before:
            known, last = past.get(id(self)), all_frames[-self.before :]
            if known is None:
                all_frames[: self.before].zero_()
                past[id(self)] = last.clone()
            else:
                all_frames[: self.before].copy_(known)
                known.copy_(last)
        return storage, all_frames

    def run(self, storage: Tensor, all_frames: Tensor, residual: Tensor | None = None) -> Tensor:
        """The convolution of what stands in `storage`; with `residual`, their sum, which may take its place."""
        frames, height, width = all_frames.shape[0] - self.before, all_frames.shape[1] - 1, all_frames.shape[2] - 1
        if self.matrix is not None:
            from luve_lightning.functional.frames import kernels

            size = frames, height + 1, width + 1, self.outputs
            out = all_frames.new_empty(size) if residual is None else residual
            base = 0 if self.rows == 3 else width + 2
            taps = (self.times, self.rows, self.window)
            kernels.convolve(storage, self.matrix, self.bias, out, residual, taps, base)
            return out
        side = self.rows // 2
        if all_frames.is_meta:  # counted as what the kernel does and allocates
            y = F.conv3d(all_frames[None].permute(0, 4, 1, 2, 3), self.weight, None, padding=(0, side, side))
            return y[0].permute(1, 2, 3, 0) if residual is None else residual
        x = inside(all_frames).permute(3, 0, 1, 2).unsqueeze(0)
        y = F.conv3d(x, self.weight, self.bias.to(self.weight.dtype), padding=(0, side, side))
        y = y.squeeze(0).permute(1, 2, 3, 0)
        out = bordered(frames, height, width, self.outputs, all_frames)
        inside(out).copy_(y if residual is None else y + inside(residual))
        return out

    @cached_property
    def mirrored(self) -> Convolution:
        """The convolution of gradients: weights transposed and mirrored, looking ahead."""
        with keeping():
            weight = self.source.detach()
            return Convolution(weight.flip(tuple(range(2, weight.ndim))).transpose(0, 1), None, self.dtype)

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient with respect to what is convolved, after the norm; of a whole clip, bordered as its own."""
        frames, height, width, channels = gradient.shape
        storage, all_frames = self.mirrored.storage(frames, height - 1, width - 1, gradient)
        all_frames[:frames, ..., :channels].copy_(gradient)
        all_frames[:frames, ..., channels:].zero_()
        all_frames[frames:].zero_()  # what follows the clip
        return self.mirrored.run(storage, all_frames)

    def gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to `x`, a whole clip."""
        found = self.input_gradient(gradient)
        return found if self.norm is None else self.norm.gradient(x, found)


class Linear:
    """A convolution of kernel 1, on any positions x channels; it ignores channels that pad its input."""

    def __init__(self, module: nn.Conv2d | nn.Conv3d, dtype: torch.dtype) -> None:
        self.weight = module.weight.detach().flatten(1).to(dtype)
        self.bias = None if module.bias is None else module.bias.detach().to(dtype)
        self.channels = self.weight.shape[0]

    def __call__(self, x: Tensor, past: Past | None = None) -> Tensor:
        """The last dimension mapped."""
        return F.linear(x[..., : self.weight.shape[1]], self.weight, self.bias)

    def gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to `x`."""
        return F.pad(gradient @ self.weight, (0, x.shape[-1] - self.weight.shape[1]))


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention with one head, each frame by itself: frames x tokens x channels."""
    if uses_kernels(q) and not torch.is_grad_enabled():
        from luve_lightning.functional.frames import kernels

        if q.shape[-1] == kernels.ATTENTION_WIDTH:
            return kernels.attend(q, k, v)
    return F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)


class Through(torch.autograd.Function):
    """A layer on a whole clip, with the gradient that its `gradient` computes from the input and the output's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        """The layer's output."""
        ctx.save_for_backward(x)
        ctx.layer = layer
        return layer(x.clone(), {})

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """With respect to the input."""
        [x] = ctx.saved_tensors
        return ctx.layer.gradient(x, gradient.contiguous()), None
