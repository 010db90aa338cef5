"""Memory that decoding and encoding in tiles take, from the VAE's architecture, and the tile that fits a budget.

Counted are the tensors alive at the peak: the histories of all layers, and what the layer in force holds. Weights,
the latents, the video and what a convolution's algorithm takes for itself (cuDNN's workspace) come on top, and
attention must be of a kind that makes no h*w x h*w matrix, as PyTorch's fused ones.

Wan2.1's VAE, 49 frames, GiB to decode (encoding takes a little less); bfloat16 takes half. "One" is a single tile,
untiled. At 4K, from tile 64 down, the part that runs on whole frames is what is left.

| float32   | video | one   | 128  | 96   | 64  | 48  | 32  |
| --------- | ----- | ----- | ---- | ---- | --- | --- | --- |
| 1280x720  | 0.5   | 15.2  | 7.9  | 7.9  | 2.9 | 2.3 | 1.4 |
| 2560x1472 | 2.1   | 62.2  | 11.7 | 9.1  | 5.5 | 3.6 | 3.6 |
| 3840x2176 | 4.6   | 138.0 | 14.3 | 12.0 | 8.0 | 8.0 | 8.0 |

Work repeated in the tiles' surroundings at 4K: 6 % with 128, 7 % with 96, 13 % with 64, 16 % with 48, 26 % with 32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanMidBlock, WanResample, WanResidualBlock

from luve_lightning.models.tiled_decode import decoder_layers
from luve_lightning.models.tiled_encode import encoder_layers
from luve_lightning.models.wan_tiles import BEFORE, Layer, check_tile, spread, times, trace

# Latent frames, height and width; height and width of a tile.
Size = tuple[int, int, int]
Tile = tuple[int, int]

SMALLEST_TILE = 8  # latents along an edge: below, a tile is mostly halo
HALO = 4  # latents along both edges together that the layers after the first resampling see, about


class _Held(NamedTuple):
    """What a layer holds, in values per position of its input."""

    history: float
    working: float
    frames: int  # of its output, for those of its input


def decode_memory(vae: AutoencoderKLWan, size: Size, tile: Tile) -> int:
    """Bytes at the peak of `decode_tiled` for one clip, in the VAE's dtype; the module says what is counted.

    Args:
        vae: a Wan2.1 VAE, on any device, meta included.
        size: latent frames, height and width of the clip.
        tile: greatest height and width of a tile in latents.
    """
    whole, tiled = decoder_layers(vae)
    areas = _areas(tiled, size, tile, 2 ** sum(layer.up for layer in tiled), before=1)
    return _peak(vae, size, whole, _running(vae, tiled, 1, areas))


def encode_memory(vae: AutoencoderKLWan, size: Size, tile: Tile) -> int:
    """Bytes at the peak of `encode_tiled`; arguments as in `decode_memory`: the size is that of the latents."""
    tiled, whole = encoder_layers(vae)
    areas = _areas(tiled, size, tile, 1, before=2 ** sum(layer.down for layer in tiled))
    return _peak(vae, size, whole, _running(vae, tiled, vae.config.scale_factor_temporal, areas))


def tile_within(
    vae: AutoencoderKLWan,
    size: Size,
    budget: float,
    memory: Callable[[AutoencoderKLWan, Size, Tile], int] = decode_memory,
) -> Tile:
    """The tile with the least repeated work whose peak is within a budget.

    Args:
        vae: a Wan2.1 VAE.
        size: latent frames, height and width of the clip.
        budget: bytes, as counted by `memory`.
        memory: `decode_memory` or `encode_memory`.

    Raises:
        ValueError: when the smallest tile takes more.
    """
    _, h, w = size
    smallest = min(h, SMALLEST_TILE), min(w, SMALLEST_TILE)
    parts = product(range(1, h // smallest[0] + 1), range(1, w // smallest[1] + 1))
    # Work grows with the area of all tiles, halos included.
    for rows, columns in sorted(parts, key=lambda n: (h + n[0] * HALO) * (w + n[1] * HALO)):
        tile = math.ceil(h / rows), math.ceil(w / columns)
        if memory(vae, size, tile) <= budget:
            return tile
    least = memory(vae, size, smallest) / 2**30
    raise ValueError(
        f"budget of {budget / 2**30:.2f} GiB: {size[0]} latent frames of {h}x{w} need at least {least:.2f} GiB in tiles"
    )


def _peak(vae: AutoencoderKLWan, size: Size, whole: Sequence[Layer], tiles: float) -> int:
    """The greater of both parts' peaks, each with the features that lie between the parts."""
    frames, h, w = size
    channels = next(layer.module.dim for layer in whole if isinstance(layer.module, WanMidBlock))
    itemsize = next(vae.parameters()).element_size()
    features = frames * h * w * channels * itemsize
    return math.ceil(features + max(tiles, _running(vae, whole, 1, [h * w] * len(whole))))


def _running(vae: AutoencoderKLWan, layers: Sequence[Layer], frames: int, areas: Sequence[int]) -> float:
    """Bytes at the peak of a chain whose layers' inputs have these areas, for chunks of so many frames."""
    itemsize = next(vae.parameters()).element_size()
    histories, most = 0.0, 0.0
    for layer, area in zip(layers, areas, strict=True):
        held = _held(layer, frames, half=itemsize < 4)
        histories += held.history * area
        most = max(most, held.working * area)
        frames = held.frames
    return (histories + most) * itemsize


def _areas(layers: Sequence[Layer], size: Size, tile: Tile, scale: int, before: int) -> list[int]:
    """Positions of each layer's input in the tile with the widest surroundings.

    Args:
        layers: the chain.
        size: that of the latents.
        tile: that of the tile in latents.
        scale: how much finer than the latents the chain's output is.
        before: how much finer than the latents its input is.
    """
    check_tile(tile)
    heights, widths = (
        [
            max(b - a for a, b in ends)
            for ends in zip(
                *(trace(layers, times(s, scale), n * before) for s in spread(n, part)), strict=True
            )
        ]
        for n, part in zip(size[1:], tile, strict=True)
    )
    return [height * width for height, width in zip(heights, widths, strict=True)][:-1]


def _held(layer: Layer, frames: int, half: bool) -> _Held:
    """Follow the layer's code: inputs stay alive while it runs, and each convolution pads a copy with its history."""
    module: Any = layer.module

    def causal(channels: int) -> int:
        return (
            2 * (frames + BEFORE) * channels + BEFORE * channels
        )  # joined to its history, padded; new history

    if isinstance(module, WanMidBlock):
        resnets = [_held(Layer(resnet, reach=2), frames, half) for resnet in module.resnets]
        return _Held(sum(r.history for r in resnets), max(r.working for r in resnets), frames)
    if isinstance(module, WanResidualBlock):
        first, second = module.in_dim, module.out_dim
        shortcut = frames * second * (first != second)
        convolutions = max(frames * first + causal(first), frames * second + causal(second))
        norm = frames * second * (5 if half else 4)  # in float32 whatever the dtype
        return _Held(BEFORE * (first + second), frames * first + shortcut + max(convolutions, norm), frames)
    if isinstance(module, WanResample):
        return _held_resampling(module, frames, half)
    inner, outer = module.in_channels, module.out_channels
    given = frames * inner * (1 if layer.activation is None else 2)
    return _Held(
        BEFORE * inner, given + max(causal(inner), (frames + BEFORE) * inner + frames * outer), frames
    )


def _held_resampling(module: Any, frames: int, half: bool) -> _Held:
    channels, temporal = module.dim, module.mode.endswith("3d")
    given = frames * channels
    if module.mode.startswith("down"):
        # A copy with frames as batch, a padded copy, and the output.
        after = frames // 2 if temporal else frames
        return _Held(channels / 4 * temporal, 3.25 * given, max(1, after))
    after = frames * 2 if temporal else frames
    # Doubled in height and width: in float32, then in the dtype; in float32 these are one, beside the output.
    doubled = 4 * after * channels
    outer = 4 * after * module.resample[-1].out_channels
    working = given + after * channels + (3 * doubled if half else doubled + outer)
    return _Held(BEFORE * channels * temporal, working, after)
