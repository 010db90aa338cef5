"""Encoding in tiles that leave no seams: the untiled result to rounding, in bounded memory.

The counterpart of `tiled_decode`: the layers down to the latents' resolution run in tiles with as much of their
surroundings as they see, what follows at that resolution, the mid block's attention included, on whole frames. In
time both go in chunks of as many frames as a latent frame holds. The video may stay on the CPU.
"""

from __future__ import annotations

from itertools import product

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from torch import Tensor, nn

from luve_lightning.models.wan_tiles import (
    DEFAULT_TILE,
    EVERYWHERE,
    Layer,
    TileRun,
    bring_to_device,
    check_tile,
    frame_sizes,
    layer_of,
    spread,
    times,
    trace,
    whole_frames,
)
from luve_lightning.models.wan_whole_clip import refuse_residual


def encoder_layers(vae: AutoencoderKLWan) -> tuple[list[Layer], list[Layer]]:
    """The encoder's chain before `quant_conv`: what runs in tiles, and what runs on whole frames.

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
    """Posterior moments of a clip, encoded in tiles: `vae.encode(video).latent_dist.parameters` to rounding.

    No state is kept on the VAE.

    Args:
        vae: a Wan2.1 VAE; what is computed is on its device and in its dtype.
        video: B x 3 x T x H x W in [-1, 1], of any floating type, on any device; T = 4k + 1, H and W multiples of 8.
        tile: greatest height and width of a tile in latents. The frame is cut into as few parts as that allows, as
            equal as possible.

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
    """What the first part of the encoder makes of each chunk, on the device and in the dtype of `like`."""
    height, width = (n // patch for n in chunks[0].shape[3:])
    h, w = (frame_sizes(layers, n)[-1] for n in (height, width))
    features: list[Tensor] = []
    for tile_rows, tile_columns in product(spread(h, tile[0]), spread(w, tile[1])):
        rows, columns = trace(layers, tile_rows, height), trace(layers, tile_columns, width)
        run = TileRun(layers, rows, columns)
        pixels = slice(*times(rows[0], patch)), slice(*times(columns[0], patch))
        for i, frames in enumerate(chunks):
            part = run(patchify(frames[..., *pixels].to(like), patch))
            if i == len(features):  # in the first tile, which tells the channels
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
