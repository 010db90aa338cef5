"""A causal video autoencoder on bordered frames: its blocks, and the chain that takes a clip in chunks.

The layers are causal: any cut of the clip in time gives equal results. Chunks are as long as memory allows.

Shapes: clips are C x T x H x W, frames with border T x (H + 1) x (W + 1) x C ("bordered").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from luve_lightning.functional.frames import (
    Convolution,
    FrameLayer,
    Linear,
    Norm,
    Past,
    Through,
    attended,
    bordered,
    inside,
    keeping,
)  # fmt: skip

_WHOLE = 2**31 - 1  # values in one call of cuDNN's

# Most memory for the features of one chunk and what they look back on; longer chunks are no faster.
_CHUNK_BYTES = 40 * 2**30

# The part of free memory that they may take; coarser features and gaps between allocations take the rest. Decoding at
# 4K they are 44.8 GiB by the formula of `at_once`; beside weights and pixels 52 were allocated, and 6 lay between.
_SHARE = 0.75


def chunk_room(device: torch.device) -> float:
    """Bytes that the features of a chunk may take on a device; no limit but a CPU's own."""
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if _SHARE * (free + held) < _CHUNK_BYTES:
        # What PyTorch holds in pieces serves no larger tensor.
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        held = 0
    return _SHARE * (free + held)


class Residual:
    """Two convolutions, each after its norm, and what skips them.

    Args:
        first: with a norm.
        second: with a norm.
        shortcut: for what skips them, where the channels change.
    """

    def __init__(self, first: Convolution, second: Convolution, shortcut: Linear | None) -> None:
        self.first, self.second, self.shortcut = first, second, shortcut

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        """The next frames; bordered. They may take the place of `x`."""
        y = self.first(x, past)
        storage = self.second.fill(y, past)
        del y
        return self.second.run(*storage, x if self.shortcut is None else self.shortcut(x))

    def gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to `x`, a whole clip."""
        assert self.first.norm is not None
        assert self.second.norm is not None
        found = self.second.norm.gradient(self.first(x, {}), self.second.input_gradient(gradient))
        skipped = gradient if self.shortcut is None else self.shortcut.gradient(x, gradient)
        return self.first.norm.gradient(x, self.first.input_gradient(found), skipped)


class FrameAttention:
    """Self-attention of each frame by itself, with one head as wide as the channels, added to its input."""

    def __init__(self, norm: Norm, to_qkv: Linear, proj: Linear) -> None:
        self.norm, self.to_qkv, self.proj = norm, to_qkv, proj

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        """The next frames; bordered."""
        normed = torch.empty_like(x)
        self.norm(x, normed)
        y = x.clone()
        inside(y).add_(self.added(inside(normed)))
        return y

    def added(self, normed: Tensor) -> Tensor:
        """What attention adds, T x H x W x C."""
        q, k, v = self.to_qkv(normed.flatten(1, 2)).chunk(3, dim=-1)
        return self.proj(attended(q, k, v)).view(normed.shape)

    def gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to `x`, by PyTorch's operations."""
        with torch.enable_grad():
            seen = inside(x).detach().requires_grad_()
            added = self.added(self.norm.values(seen).to(x.dtype))
            [found] = torch.autograd.grad(added, seen, inside(gradient))
        result = gradient.clone()
        inside(result).add_(found)
        return result


class Down:
    """Halves height and width, and with `time` the frames after the clip's first.

    Args:
        weight: of a Conv2d of kernel 3 and stride 2, padded below and to the right.
        bias: one per channel.
        dtype: dtype of the weights here.
        time: a convolution of kernel 3 in time, of which every other result is taken.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, time: Convolution | None) -> None:
        self.weight = weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.time = time

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        """The next frames; bordered."""
        frames, height, width = x.shape[0], x.shape[1] - 1, x.shape[2] - 1
        y = bordered(frames, height // 2, width // 2, self.weight.shape[0], x)
        at_once = max(1, _WHOLE // x[0].numel())
        # The border is the padding, one row below and one column to the right.
        for part, place in zip(x.split(at_once), inside(y).split(at_once), strict=True):
            place.copy_(F.conv2d(part.permute(0, 3, 1, 2), self.weight, self.bias, stride=2).permute(0, 2, 3, 1))
        if self.time is None:
            return y
        first = id(self.time) not in past
        z = self.time(y, past)  # at every frame; the odd ones of a stride of 2 are dropped
        return torch.cat([y[:1], z[2::2]]) if first else z[1::2].contiguous()


class Up:
    """Doubles height and width, and with `time` the frames after the clip's first.

    Args:
        conv: runs on the doubled frames.
        time: a convolution of kernel 3 in time, with two frames' channels as its result.
    """

    def __init__(self, conv: Convolution, time: Convolution | None) -> None:
        self.conv, self.time = conv, time

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        """The next frames; bordered."""
        if self.time is None:
            parts = [inside(x).unsqueeze(1)]
        else:
            # The clip's first frame is not doubled, and the others do not look back on it.
            first = id(self.time) not in past
            if first:
                past[id(self.time)] = x.new_zeros(self.time.before, *x.shape[1:])
            parts, rest = ([inside(x[:1]).unsqueeze(1)], x[1:]) if first else ([], x)
            if len(rest):
                # frames x (height x width) x 2 channels: a pair of frames each
                parts.append(inside(self.time(rest, past)).unflatten(-1, (2, -1)).permute(0, 3, 1, 2, 4))
        frames = sum(part.shape[0] * part.shape[1] for part in parts)
        height, width = x.shape[1] - 1, x.shape[2] - 1
        storage, all_frames = self.conv.storage(frames, 2 * height, 2 * width, x)
        all_frames[:, -1].zero_()
        all_frames[:, :, -1].zero_()
        start = 0
        for part in parts:
            count = part.shape[0] * part.shape[1]
            place = inside(all_frames[start : start + count]).unflatten(0, part.shape[:2])
            place.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).copy_(part[:, :, :, None, :, None])
            start += count
        return self.conv.run(storage, all_frames)

    def gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to `x`, a whole clip."""
        fine = inside(self.conv.input_gradient(gradient))
        summed = fine.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).sum((2, 4))
        result = bordered(x.shape[0], x.shape[1] - 1, x.shape[2] - 1, x.shape[3], x)
        if self.time is None:
            inside(result).copy_(summed)
            return result
        inside(result[:1]).copy_(summed[:1])
        if len(x) > 1:
            pairs = bordered(len(x) - 1, x.shape[1] - 1, x.shape[2] - 1, 2 * x.shape[3], x)
            inside(pairs).copy_(summed[1:].unflatten(0, (-1, 2)).permute(0, 2, 3, 1, 4).flatten(3))
            result[1:] = self.time.input_gradient(pairs)
        return result


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


@dataclass
class Chain:
    """Layers in order, which remember what they look back on.

    Attributes:
        layers: each called with bordered frames and the past.
        finest: the first layer of the finest part, and how many frames go through that part at once.
        past: what was seen so far.
    """

    layers: list[FrameLayer]
    finest: tuple[int, int] | None = None
    past: Past = field(default_factory=dict)

    @property
    def inputs(self) -> int:
        """Channels of the first layer's input, padded."""
        return int(self.layers[0].inputs)  # type: ignore[attr-defined]

    @property
    def outputs(self) -> int:
        """Channels of the last layer's output, without padding."""
        return int(self.layers[-1].channels)  # type: ignore[attr-defined]

    def __call__(self, clip: Tensor) -> Tensor:
        """C x T x H x W, the next frames, to C' x T' x H' x W'; autocast is off."""
        with _without_autocast(clip.device):
            return self._next(clip)

    def _next(self, clip: Tensor) -> Tensor:
        channels, frames, height, width = clip.shape
        x = bordered(frames, height, width, self.inputs, clip)
        inside(x)[..., :channels].copy_(clip.permute(1, 2, 3, 0))
        first, at_once = self.finest or (len(self.layers), frames)
        x = self._run(x, self.layers[:first])
        if self.finest:
            x = torch.cat([self._run(part, self.layers[first:]) for part in x.split(at_once)])
        return inside(x)[..., : self.outputs].permute(3, 0, 1, 2)

    def _run(self, x: Tensor, layers: list[FrameLayer]) -> Tensor:
        for layer in layers:
            x = layer(x, self.past)
        return x


class FrameCodec:
    """A causal video autoencoder on whole frames, a chunk of latent frames at a time.

    Args:
        encoder: makes the encoder's layers, when they are first needed.
        decoder: makes the decoder's.
        before: applied to latents before the decoder.
        per_latent: frames per latent frame; the first one is a single frame.
        ratio: pixels per latent in height and width.
        dtype: dtype of everything between the layers.
        device: where the weights are.
    """

    def __init__(
        self,
        encoder: Callable[[], list[FrameLayer]],
        decoder: Callable[[], list[FrameLayer]],
        before: Linear,
        per_latent: int,
        ratio: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._make_encoder, self._make_decoder, self.before = encoder, decoder, before
        self.per_latent, self.ratio, self.dtype, self.device = per_latent, ratio, dtype, device

    @cached_property
    def encoder(self) -> list[FrameLayer]:
        """The encoder's layers: a convolution first, the mapping to moments last."""
        with keeping():
            return self._make_encoder()

    @cached_property
    def decoder(self) -> list[FrameLayer]:
        """The decoder's layers: a convolution first and last."""
        with keeping():
            return self._make_decoder()

    @torch.no_grad()
    def encode(self, clip: Tensor, latents_at_once: int | None = None) -> Tensor:
        """Posterior moments of one clip, mean and log-variance stacked.

        Args:
            clip: C x T x H x W; T = per_latent k + 1, on the weights' device.
            latents_at_once: length of a chunk; default `at_once`.
        """
        chain, moments = Chain(self.encoder), []
        latents = (clip.shape[1] - 1) // self.per_latent + 1
        length = latents_at_once or self.at_once(clip.shape[2], clip.shape[3], False, chunk_room(self.device))
        for start in range(0, latents, length):
            frames = clip[:, self._first_frame(start) : self._first_frame(start + length)]
            moments.append(chain(frames.to(self.dtype)))
        return torch.cat(moments, dim=1)

    @torch.no_grad()
    def decode(
        self, latents: Tensor, latents_at_once: int | None = None, finest_at_once: int | None = None
    ) -> Iterator[Tensor]:
        """The pixels of one clip, chunk by chunk, C x T x H x W each, not clamped.

        Args:
            latents: C x t x h x w, on the weights' device.
            latents_at_once: length of a chunk; default `at_once`.
            finest_at_once: frames that go through the finest part at once; default `finest_at_once`.
        """
        size, room = (latents.shape[2] * self.ratio, latents.shape[3] * self.ratio), chunk_room(self.device)
        length = latents_at_once or self.at_once(*size, True, room)
        finest = finest_at_once or self.finest_at_once(*size, length, room)
        ups = [i for i, layer in enumerate(self.decoder) if isinstance(layer, Up) and layer.time is None]
        chain = Chain(self.decoder, (ups[-1], finest) if ups else None)
        for z in latents.split(length, dim=1):
            yield chain(self._before(z).permute(3, 0, 1, 2))

    def decode_differentiable(self, latents: Tensor) -> Tensor:
        """The pixels of one clip, C x T x H x W, with gradients to its latents, not clamped.

        With gradients it takes one pass, and a layer keeps its input alone.
        """
        if not (torch.is_grad_enabled() and latents.requires_grad):
            return torch.cat(list(self.decode(latents)), dim=1)
        z, chain = self._before(latents), Chain(self.decoder)
        x = F.pad(z, (0, chain.inputs - z.shape[3], 0, 1, 0, 1))
        with _without_autocast(self.device):
            for layer in self.decoder:
                x = Through.apply(x, layer)
        return inside(x)[..., : chain.outputs].permute(3, 0, 1, 2)

    def at_once(self, height: int, width: int, decoding: bool, room: float = math.inf) -> int:
        """Latent frames of a chunk, for frames of this size; at least one.

        The finest features take nearly all memory. With f frames of them in a chunk, encoding holds 3 f + 2 at once
        (a block's input, the first convolution's output, normed with its past) and decoding 3.5 f (before, while and
        after they are doubled); what the layers look back on takes 14 and 23 more.

        Args:
            height: pixels.
            width: pixels.
            decoding: or encoding.
            room: bytes for these features, see `chunk_room`; no more than 40 GiB are used.
        """
        each, past = (3.5, 23) if decoding else (3.0, 16)
        frames = min(room, _CHUNK_BYTES) / self._frame_bytes(height, width, decoding)
        return max(1, int((frames - past) / (each * self.per_latent)))

    def finest_at_once(self, height: int, width: int, length: int, room: float = math.inf) -> int:
        """Frames that go through the decoder's finest part at once, in chunks of `length` latent frames.

        All of a chunk; of a single latent frame two, because perhaps not even one fits by `at_once`, or one where
        two do not fit in `room`.
        """
        if length > 1:
            return length * self.per_latent
        return 2 if (2 * 3.5 + 23) * self._frame_bytes(height, width, True) <= room else 1

    def _frame_bytes(self, height: int, width: int, decoding: bool) -> int:
        """Bytes of a frame of the finest features."""
        layer = self.decoder[-1] if decoding else self.encoder[0]
        assert isinstance(layer, Convolution)
        return (layer.inputs if decoding else layer.outputs) * height * width * self.dtype.itemsize

    def _before(self, latents: Tensor) -> Tensor:
        """T x H x W x C."""
        with _without_autocast(self.device):
            return self.before(latents.to(self.dtype).permute(1, 2, 3, 0))

    def _first_frame(self, latent: int) -> int:
        return max(0, (latent - 1) * self.per_latent + 1)
