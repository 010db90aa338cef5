"""Encoding and decoding in tiles without seams: equal to the untiled form up to rounding, in bounded memory.

diffusers' tiled decoding runs the whole decoder on overlapping tiles and blends them. Each tile then has its own
attention in the mid block, and sees zeros where its neighbours should be: with affordable overlaps the result
visibly differs from the untiled one, even in a tile's middle.

Here everything at the latents' resolution, including the attention, runs on whole frames. Only what is finer,
where nearly all memory goes, runs in tiles. These layers are local: a residual block sees 2 positions around (two
3x3x3 convolutions), a resampling or single convolution 1, and the norms only one position (RMS over channels). A tile
is therefore exact when each layer gets everything that its wanted output depends on (`needed`), and when its output
beyond that, wrong because of the zeros with which its convolutions pad a tile, is cropped away (`TileRun`). Where
the tile ends with the frame, those zeros are the untiled form's padding. Cropping after each layer keeps the halo
small: about 8 positions at the finest resolution instead of the whole chain's at the coarsest.

In time both parts go latent frame by latent frame, as in diffusers' untiled form, so memory does not grow with the
clip, except for the features between the parts and the video itself, which may stay on the CPU. The layers are
causal. They keep the frames they look back on in a history per tile: the list that diffusers' blocks take as
`feat_cache`, but held here and not on the VAE, so two threads may share one VAE.

Shapes: x is B x C x T x H x W throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
    patchify,
    unpatchify,
)  # fmt: skip
from torch import Tensor, nn

from luve_lightning.functional.pixels import video_to_frames

Span = tuple[int, int]  # positions [start, stop) along the height or the width of a frame

DEFAULT_TILE = (64, 64)  # latents, 512x512 pixels: smaller tiles save nothing at 4K
EVERYWHERE = 2**40  # the reach of a layer that needs the whole frame
BEFORE = 2  # frames that a causal convolution of kernel 3 looks back on
_DISTINCT = 3  # chunks of a tile that differ in a dry run: the first, the second, all others


@dataclass(frozen=True)
class Layer:
    """One layer of the chain.

    Attributes:
        module: diffusers' block, which takes `feat_cache` and `feat_idx`, or a causal convolution.
        reach: number of surrounding positions that an output position depends on: in the input's resolution, or in
            the output's when upsampling. `EVERYWHERE` for the mid block.
        up: whether the layer doubles height and width.
        down: whether the layer halves them: output i is made from inputs 2i, 2i + 1 and 2i + 2.
        activation: activation before the convolution; None for a block.
    """

    module: Any
    reach: int
    up: bool = False
    down: bool = False
    activation: nn.Module | None = None

    def size(self, size: int) -> int:
        """Height or width of the output for one of the input; likewise where the output begins."""
        return size * 2 if self.up else size // 2 if self.down else size

    def needed(self, wanted: Span, size: int) -> Span:
        """The input that an output depends on; `size` is the input's whole height or width, where a span ends."""
        start, stop = wanted
        if self.down:
            return 2 * start, min(size, 2 * stop + 1)
        scale = 2 if self.up else 1
        return max(0, start - self.reach) // scale, min(size, math.ceil((stop + self.reach) / scale))

    def history(self) -> list[Any]:
        """The object to pass to `__call__` with the first chunk, and again with each next one."""
        return [None] * sum(isinstance(module, WanCausalConv3d) for module in self.module.modules())

    def __call__(self, x: Tensor, history: list[Any]) -> Tensor:
        """The layer's output for a chunk: the frames after those of the last call with this history, at first one.

        `history` is changed in place.
        """
        if not isinstance(self.module, WanCausalConv3d):
            return self.module(x, feat_cache=history, feat_idx=[0])
        if self.activation is not None:
            x = self.activation(x)
        [past] = history
        last = x[:, :, -BEFORE:]
        short = past is not None and last.shape[2] < BEFORE
        history[0] = torch.cat([past[:, :, -1:], last], dim=2) if short else last.clone()
        return self.module(x, past)


def layer_of(module: Any) -> Layer:
    """The layer for a block of the encoder's `down_blocks` or the decoder's `up_blocks`.

    Raises:
        ValueError: for a block that is not local (attention).
    """
    if isinstance(module, WanResidualBlock):
        return Layer(module, reach=2)
    if isinstance(module, WanResample) and module.mode.startswith(("up", "down")):
        return Layer(module, reach=1, up=module.mode.startswith("up"), down=module.mode.startswith("down"))
    raise ValueError(
        f"{type(module).__name__} outside the VAE's mid block: a tile needs the whole frame for it; expected a "
        "Wan2.1 AutoencoderKLWan with attn_scales=[]"
    )


def frame_sizes(layers: Sequence[Layer], size: int) -> list[int]:
    """Heights or widths of the frame before the first layer and after each layer."""
    sizes = [size]
    for layer in layers:
        sizes.append(layer.size(sizes[-1]))
    return sizes


def trace(layers: Sequence[Layer], wanted: Span, size: int) -> list[Span]:
    """The span, before the first layer and after each, that `wanted`, a span of the last output, depends on.

    `size` is the height or width of the first layer's input.
    """
    spans = [wanted]
    for layer, before in zip(reversed(layers), frame_sizes(layers, size)[-2::-1], strict=True):
        spans.append(layer.needed(spans[-1], before))
    return spans[::-1]


class TileRun:
    """The chain on one tile: called with a clip's chunks in turn, it returns their tile of the last output.

    `rows` and `columns` are spans from `trace`.
    """

    def __init__(self, layers: Sequence[Layer], rows: Sequence[Span], columns: Sequence[Span]) -> None:
        self.layers, self.rows, self.columns = layers, rows, columns
        self.histories = [layer.history() for layer in layers]

    def __call__(self, x: Tensor) -> Tensor:
        """The tile of the last output for its next frames: `rows[0]` x `columns[0]` of the first layer's input."""
        for i, (layer, history) in enumerate(zip(self.layers, self.histories, strict=True)):
            x = layer(x, history)
            top, left = layer.size(self.rows[i][0]), layer.size(self.columns[i][0])
            (y0, y1), (x0, x1) = self.rows[i + 1], self.columns[i + 1]
            x = x[..., y0 - top : y1 - top, x0 - left : x1 - left]
        return x


def whole_frames(layers: Sequence[Layer], chunks: Iterable[Tensor]) -> list[Tensor]:
    """The chain on whole frames, chunk by chunk: one output per chunk."""
    histories = [layer.history() for layer in layers]
    outputs = []
    for x in chunks:
        for layer, history in zip(layers, histories, strict=True):
            x = layer(x, history)
        outputs.append(x)
    return outputs


def spread(size: int, tile: int) -> list[Span]:
    """Cut `size` positions into as few and as equal parts of at most `tile` as possible."""
    parts = math.ceil(size / tile)
    return [(i * size // parts, (i + 1) * size // parts) for i in range(parts)]


def check_tile(tile: tuple[int, int]) -> None:
    """Raise a ValueError for an empty tile."""
    if min(tile) < 1:
        raise ValueError(f"tile {tile[0]}x{tile[1]}: expected at least 1x1 latents")


def times(span: Span, factor: int) -> Span:
    """The span in a resolution that is `factor` times as fine."""
    return span[0] * factor, span[1] * factor


def bring_to_device(vae: AutoencoderKLWan) -> None:
    """Move a VAE that a pipeline has offloaded to its device, as `vae.encode` and `vae.decode` do first."""
    hook = getattr(vae, "_hf_hook", None)
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(vae)


def refuse_residual(vae: AutoencoderKLWan) -> None:
    """Raise a ValueError for Wan2.2's VAE, whose blocks this package's forms do not know."""
    if vae.config.is_residual:
        raise ValueError("this VAE has Wan2.2's residual blocks (is_residual=True); expected a Wan2.1 AutoencoderKLWan")


def decoder_layers(vae: AutoencoderKLWan) -> tuple[list[Layer], list[Layer]]:
    """The decoder's chain after `post_quant_conv`: the part for whole frames, and the part for tiles.

    The second part begins with the first upsampling.

    Raises:
        ValueError: for Wan2.2's residual VAE.
    """
    refuse_residual(vae)
    net = vae.decoder
    blocks: list[nn.Module] = []
    for block in net.up_blocks:
        blocks += [*block.resnets, *(block.upsamplers or [])]
    layers = [layer_of(block) for block in blocks]
    first = next((i for i, layer in enumerate(layers) if layer.up), len(layers))
    head = Layer(net.conv_out, reach=1, activation=nn.Sequential(net.norm_out, net.nonlinearity))
    whole = [Layer(net.conv_in, reach=1), Layer(net.mid_block, reach=EVERYWHERE), *layers[:first]]
    return whole, [*layers[first:], head]


@torch.no_grad()
def decode_tiled(
    vae: AutoencoderKLWan, latents: Tensor, tile: tuple[int, int] = DEFAULT_TILE, *, out: Tensor | None = None
) -> Tensor:
    """Decode a clip in tiles, equal to `vae.decode(latents).sample` up to rounding, whatever the tile.

    Args:
        vae: a Wan2.1 VAE; computation uses its device and dtype.
        latents: denormalised latents, B x C x t x h x w, of any h and w.
        tile: greatest height and width of a tile in latents. The frame is cut into as few and as equal parts as
            that allows.
        out: tensor to write the video to, on any device, for instance the CPU when the whole video does not fit
            beside the VAE (4.9 GB for 49 frames of 2176x3840 in float32): B x 3 x 4(t-1)+1 x 8h x 8w of a floating
            type, or B x 4(t-1)+1 x 8h x 8w x 3 of uint8. None for a new tensor of the latents' device and the
            VAE's dtype.

    Returns:
        The video clamped to [-1, 1], or its frames if `out` is uint8: `out` if given.

    Raises:
        ValueError: for a residual (Wan2.2) VAE, a tile below 1x1, and an `out` of another shape or type.
    """
    whole, tiled = decoder_layers(vae)
    check_tile(tile)
    bring_to_device(vae)
    z = vae.post_quant_conv(latents.to(vae.post_quant_conv.weight))
    (h, w), patch = z.shape[3:], vae.config.patch_size or 1
    scale, size = _video_size(vae, tiled, z)
    out = latents.new_empty(size, dtype=z.dtype) if out is None else check_room(out, size)

    features = whole_frames(whole, z.split(1, dim=2))
    for tile_rows, tile_columns in product(spread(h, tile[0]), spread(w, tile[1])):
        rows, columns = trace(tiled, times(tile_rows, scale), h), trace(tiled, times(tile_columns, scale), w)
        run = TileRun(tiled, rows, columns)
        place = slice(*times(rows[-1], patch)), slice(*times(columns[-1], patch))
        start = 0
        for frame in features:
            part = run(frame[..., slice(*rows[0]), slice(*columns[0])])
            start = write_frames(out, unpatchify(part, patch).clamp(-1, 1), start, place)
    return out


def _video_size(vae: AutoencoderKLWan, tiled: list[Layer], z: Tensor) -> tuple[int, tuple[int, ...]]:
    """How many times finer the last layer's output is than the latents, and the shape of their video."""
    batch, _, t, h, w = z.shape
    patch, scale = vae.config.patch_size or 1, 2 ** sum(layer.up for layer in tiled)
    frames = (t - 1) * vae.config.scale_factor_temporal + 1
    return scale, (batch, vae.config.out_channels // patch**2, frames, h * scale * patch, w * scale * patch)


def write_frames(
    out: Tensor, video: Tensor, start: int, place: tuple[slice, slice] = (slice(None), slice(None))
) -> int:
    """Put the next frames of a clip or a tile, from `start`, into place; returns the frame after them."""
    stop = start + video.shape[2]
    if out.dtype == torch.uint8:
        out[:, start:stop, *place] = video_to_frames(video).to(out.device)
    else:
        out[:, :, start:stop, *place] = video.to(out)
    return stop


def check_room(out: Tensor, size: tuple[int, ...]) -> Tensor:
    """`out`, if it can hold a video B x C x T x H x W of this size; else a ValueError."""
    batch, channels, *places = size
    expected = (batch, *places, channels) if out.dtype == torch.uint8 else size
    if tuple(out.shape) != expected or not (out.dtype == torch.uint8 or out.is_floating_point()):
        shape = " x ".join(map(str, out.shape))
        raise ValueError(
            f"out: {out.dtype} {shape}; expected floating point {' x '.join(map(str, size))}, or uint8 with the "
            "channels last"
        )
    return out


def dry_decode_tiled(
    counted: Callable[[int], AbstractContextManager[Any]], vae: AutoencoderKLWan, latents: Tensor, tile: tuple[int, int]
) -> None:
    """Do what `decode_tiled(vae, latents, tile)` does, equal work once: 40 tiles of 13 chunks at 4K are a dozen kinds.

    Tiles for which every layer sees the same sizes are run once and counted together; so are the chunks of a tile
    after its second, since only the first two differ.

    Operations inside `counted(n)` count n times. The VAE is on the meta device, and the latents in its dtype.
    """
    whole, tiled = decoder_layers(vae)
    z = vae.post_quant_conv(latents)
    (h, w), patch = z.shape[3:], vae.config.patch_size or 1
    scale, size = _video_size(vae, tiled, z)
    out = latents.new_empty(size)
    features = whole_frames(whole, z.split(1, dim=2))
    kinds: dict[tuple[int, ...], list[Any]] = {}
    for tile_rows, tile_columns in product(spread(h, tile[0]), spread(w, tile[1])):
        rows, columns = trace(tiled, times(tile_rows, scale), h), trace(tiled, times(tile_columns, scale), w)
        lengths = tuple(stop - start for start, stop in (*rows, *columns))
        kinds.setdefault(lengths, [TileRun(tiled, rows, columns), 0])[1] += 1
    part = None  # the last one lives until the next is made, as in `decode_tiled`
    for tile_run, count in kinds.values():
        place = slice(*times(tile_run.rows[-1], patch)), slice(*times(tile_run.columns[-1], patch))
        for index, frame in enumerate(features[:_DISTINCT]):
            with counted(count * (len(features) - index if index == _DISTINCT - 1 else 1)):
                part = tile_run(frame[..., slice(*tile_run.rows[0]), slice(*tile_run.columns[0])])
                write_frames(out, unpatchify(part, patch).clamp(-1, 1), 0, place)
        # Freed before the next tile starts, whose TileRun replaces this one there.
        tile_run.histories.clear()


def encoder_layers(vae: AutoencoderKLWan) -> tuple[list[Layer], list[Layer]]:
    """The encoder's chain before `quant_conv`: the part for tiles, and the part for whole frames.

    The second part begins after the last downsampling.

    Raises:
        ValueError: for Wan2.2's residual VAE, and for one with attention at a higher resolution than the latents'.
    """
    refuse_residual(vae)
    net = vae.encoder
    layers = [Layer(net.conv_in, reach=1), *(layer_of(block) for block in net.down_blocks)]
    last = max((i for i, layer in enumerate(layers) if layer.down), default=-1) + 1
    head = Layer(net.conv_out, reach=1, activation=nn.Sequential(net.norm_out, net.nonlinearity))
    return layers[:last], [*layers[last:], Layer(net.mid_block, reach=EVERYWHERE), head]


@torch.no_grad()
def encode_tiled(vae: AutoencoderKLWan, video: Tensor, tile: tuple[int, int] = DEFAULT_TILE) -> Tensor:
    """Posterior moments of a clip, encoded in tiles: `vae.encode(video).latent_dist.parameters` up to rounding.

    Args:
        vae: a Wan2.1 VAE; computation uses its device and dtype.
        video: B x 3 x T x H x W in [-1, 1], of any floating type, on any device; T = 4k + 1, H and W multiples of 8.
        tile: see `decode_tiled`.

    Returns:
        Mean and log-variance stacked, B x 2C x (T-1)/4+1 x H/8 x W/8, on the VAE's device and in its dtype.

    Raises:
        ValueError: for a residual (Wan2.2) VAE or one with attention outside the mid block, a tile below 1x1, and a
            size that the VAE would crop.
    """
    tiled, whole = encoder_layers(vae)
    check_tile(tile)
    bring_to_device(vae)
    weight = vae.quant_conv.weight
    patch = vae.config.patch_size or 1
    chunks = _chunks(vae, video, patch * 2 ** sum(layer.down for layer in tiled))
    features = _tiled_features(tiled, chunks, tile, patch, weight)
    return vae.quant_conv(torch.cat(whole_frames(whole, features), dim=2))


def _tiled_features(
    layers: list[Layer], chunks: list[Tensor], tile: tuple[int, int], patch: int, like: Tensor
) -> list[Tensor]:
    """The output of the encoder's first part for each chunk, on the device and in the dtype of `like`."""
    height, width = (n // patch for n in chunks[0].shape[3:])
    h, w = (frame_sizes(layers, n)[-1] for n in (height, width))
    features: list[Tensor] = []
    for tile_rows, tile_columns in product(spread(h, tile[0]), spread(w, tile[1])):
        rows, columns = trace(layers, tile_rows, height), trace(layers, tile_columns, width)
        run = TileRun(layers, rows, columns)
        pixels = slice(*times(rows[0], patch)), slice(*times(columns[0], patch))
        for i, frames in enumerate(chunks):
            part = run(patchify(frames[..., *pixels].to(like), patch))
            if i == len(features):  # in the first tile, which gives the channels
                features.append(part.new_empty((*part.shape[:3], h, w)))
            features[i][..., slice(*tile_rows), slice(*tile_columns)] = part
    return features


def _chunks(vae: AutoencoderKLWan, video: Tensor, ratio: int) -> list[Tensor]:
    """The first frame, then as many at a time as make one latent frame."""
    frames, height, width = video.shape[2:]
    per_latent = vae.config.scale_factor_temporal
    if (frames - 1) % per_latent or any(n < ratio or n % ratio for n in (height, width)):
        raise ValueError(
            f"video of {frames} frames of {height}x{width}: expected {per_latent}k + 1 frames, height and width "
            f"multiples of {ratio}"
        )
    return [video[:, :, :1], *(video[:, :, 1:].split(per_latent, dim=2) if frames > 1 else ())]
