"""Encoding and decoding in tiles without seams: equal to the untiled form up to rounding, in bounded memory.

diffusers' tiled decoding runs the whole decoder on overlapping tiles and blends them. Each tile then has its own
attention in the mid block, and sees zeros where its neighbours should be: with affordable overlaps the result
visibly differs from the untiled one, even in a tile's middle.

Here everything at the latents' resolution, including the attention, runs on whole frames. Only what is finer,
where nearly all memory goes, runs in tiles, with as much of their surroundings as the layers see (`wan_tiles`). In
time both parts go latent frame by latent frame, as in diffusers' untiled form, so memory does not grow with the
clip, except for the features between the parts and the video itself, which may stay on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import product
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from torch import Tensor, nn

from luve_lightning.functional.pixels import video_to_frames
from luve_lightning.models.backbones.wan_tiles import (
    DEFAULT_TILE,
    EVERYWHERE,
    Layer,
    TileRun,
    bring_to_device,
    check_tile,
    frame_sizes,
    layer_of,
    refuse_residual,
    spread,
    times,
    trace,
    whole_frames,
)

_DISTINCT = 3  # chunks of a tile that differ in a dry run: the first, the second, all others


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
    vae: AutoencoderKLWan,
    latents: Tensor,
    tile: tuple[int, int] = DEFAULT_TILE,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Decode a clip in tiles, equal to `vae.decode(latents).sample` up to rounding, whatever the tile.

    No state is kept on the VAE.

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
    batch, _, t, h, w = z.shape
    patch, scale = vae.config.patch_size or 1, 2 ** sum(layer.up for layer in tiled)
    frames = (t - 1) * vae.config.scale_factor_temporal + 1
    size = (batch, vae.config.out_channels // patch**2, frames, h * scale * patch, w * scale * patch)
    out = latents.new_empty(size, dtype=z.dtype) if out is None else _checked(out, size)

    features = whole_frames(whole, z.split(1, dim=2))
    for tile_rows, tile_columns in product(spread(h, tile[0]), spread(w, tile[1])):
        rows, columns = trace(tiled, times(tile_rows, scale), h), trace(tiled, times(tile_columns, scale), w)
        run = TileRun(tiled, rows, columns)
        place = slice(*times(rows[-1], patch)), slice(*times(columns[-1], patch))
        start = 0
        for frame in features:
            part = run(frame[..., slice(*rows[0]), slice(*columns[0])])
            start = _write(out, unpatchify(part, patch).clamp(-1, 1), start, place)
    return out


def _write(out: Tensor, video: Tensor, start: int, place: tuple[slice, slice]) -> int:
    """Put a tile's next frames, from `start`, into place; returns the frame after them."""
    stop = start + video.shape[2]
    if out.dtype == torch.uint8:
        out[:, start:stop, *place] = video_to_frames(video).to(out.device)
    else:
        out[:, :, start:stop, *place] = video.to(out)
    return stop


def _checked(out: Tensor, size: tuple[int, ...]) -> Tensor:
    """`out`, if it can hold a video of this size."""
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
    counted: Callable[[int], AbstractContextManager[Any]],
    vae: AutoencoderKLWan,
    latents: Tensor,
    tile: tuple[int, int],
) -> None:
    """Do what `decode_tiled(vae, latents, tile)` does, equal work once: 40 tiles of 13 chunks at 4K are a dozen kinds.

    Tiles for which every layer sees the same sizes are run once and counted together; so are the chunks of a tile
    after its second, since only the first two differ.

    Args:
        counted: context whose operations count this many times.
        vae: on the meta device.
        latents: denormalised, in the VAE's dtype.
        tile: see `decode_tiled`.
    """
    whole, tiled = decoder_layers(vae)
    z = vae.post_quant_conv(latents)
    batch, _, frames, h, w = z.shape
    patch = vae.config.patch_size or 1
    height, width = (frame_sizes(tiled, n)[-1] for n in (h, w))
    length = (frames - 1) * vae.config.scale_factor_temporal + 1
    channels = vae.config.out_channels // patch**2
    out = latents.new_empty(batch, channels, length, height * patch, width * patch)
    features = whole_frames(whole, z.split(1, dim=2))
    kinds: dict[tuple[int, ...], list[Any]] = {}
    for tile_rows, tile_columns in product(spread(h, tile[0]), spread(w, tile[1])):
        rows = trace(tiled, times(tile_rows, height // h), h)
        columns = trace(tiled, times(tile_columns, width // w), w)
        lengths = tuple(stop - start for start, stop in (*rows, *columns))
        kinds.setdefault(lengths, [TileRun(tiled, rows, columns), 0])[1] += 1
    part = None  # the last one lives until the next is made, as in `decode_tiled`
    for tile_run, count in kinds.values():
        for index, frame in enumerate(features[:_DISTINCT]):
            with counted(count * (len(features) - index if index == _DISTINCT - 1 else 1)):
                part = tile_run(frame[..., slice(*tile_run.rows[0]), slice(*tile_run.columns[0])])
                _put(out, unpatchify(part, patch).clamp(-1, 1))
        # Freed before the next tile starts, whose TileRun replaces this one there.
        tile_run.histories.clear()


def _put(out: Tensor, video: Tensor) -> None:
    frames, height, width = video.shape[2:]
    out[:, :, :frames, :height, :width] = video.to(out)


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

    No state is kept on the VAE.

    Args:
        vae: a Wan2.1 VAE; computation uses its device and dtype.
        video: B x 3 x T x H x W in [-1, 1], of any floating type, on any device; T = 4k + 1, H and W multiples of 8.
        tile: greatest height and width of a tile in latents. The frame is cut into as few and as equal parts as
            that allows.

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
