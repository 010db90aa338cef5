"""Decoding in tiles that leave no seams: the untiled result to rounding, in bounded memory.

diffusers' tiled decode runs the whole decoder on overlapping tiles and blends them. Each tile then has its own
attention in the mid block, and sees zeros where its neighbours should be: with overlaps that are affordable the
result differs visibly from the untiled one, in a tile's middle too.

Here everything at the latents' resolution, the attention included, runs on whole frames. Only what follows, where
nearly all memory goes, runs in tiles, with as much of their surroundings as the layers see (`wan_tiles`). In time
both parts go latent frame by latent frame, as diffusers' untiled decode does, so memory does not grow with the clip
but for the features between the parts and the video itself.
"""

from __future__ import annotations

from itertools import product

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn

from luve_lightning.functional.pixels import video_to_frames
from luve_lightning.models.wan_tiles import (
    DEFAULT_TILE,
    EVERYWHERE,
    Layer,
    TileRun,
    bring_to_device,
    check_tile,
    layer_of,
    spread,
    times,
    trace,
    whole_frames,
)
from luve_lightning.models.wan_whole_clip import refuse_residual


def decoder_layers(vae: AutoencoderKLWan) -> tuple[list[Layer], list[Layer]]:
    """The decoder's chain after `post_quant_conv`: what runs on whole frames, and what runs in tiles.

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
    """Decode a clip in tiles, equal to `vae.decode(latents).sample` to rounding, whatever the tile.

    No state is kept on the VAE.

    Args:
        vae: a Wan2.1 VAE; what is computed is on its device and in its dtype.
        latents: denormalised latents, B x C x t x h x w, of any h and w.
        tile: greatest height and width of a tile in latents. The frame is cut into as few parts as that allows, as
            equal as possible.
        out: where the video is written, on any device, for instance the CPU when the whole video has no place beside
            the VAE (4.9 GB for 49 frames of 2176x3840 in float32): B x 3 x 4(t-1)+1 x 8h x 8w of a floating type,
            or B x 4(t-1)+1 x 8h x 8w x 3 of uint8. None for a new tensor of the latents' device and the VAE's dtype.

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
    """Put a tile's next frames, from `start`, into their place; returns the frame after them."""
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
