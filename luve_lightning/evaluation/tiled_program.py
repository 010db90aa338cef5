"""A dry run of `decode_tiled` that does not repeat itself: 40 tiles of 13 chunks at 4K are a dozen kinds of tile."""

from __future__ import annotations

from itertools import product
from typing import Any

from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from luve_lightning.evaluation.dry_run import DryRun
from luve_lightning.models.tiled_decode import decoder_layers
from luve_lightning.models.wan_tiles import Span, TileRun, frame_sizes, spread, trace, whole_frames

_DISTINCT = 3  # chunks of a tile that differ: the first, the second, all others
_Lengths = tuple[int, ...]


def dry_decode_tiled(run: DryRun, vae: AutoencoderKLWan, latents: Tensor, tile: tuple[int, int]) -> None:
    """Count what `decode_tiled(vae, latents, tile)` takes.

    Tiles of which every layer sees the same sizes are run once and counted together; so are the chunks of a tile after
    its second, which differ from the first two only.

    Args:
        run: of the dry run this is called in.
        vae: on the meta device.
        latents: denormalised, in the VAE's dtype.
        tile: greatest height and width of a tile in latents.
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
    kinds: dict[_Lengths, list[Any]] = {}
    for tile_rows, tile_columns in product(spread(h, tile[0]), spread(w, tile[1])):
        rows = trace(tiled, _times(tile_rows, height // h), h)
        columns = trace(tiled, _times(tile_columns, width // w), w)
        lengths = tuple(stop - start for start, stop in (*rows, *columns))
        kinds.setdefault(lengths, [TileRun(tiled, rows, columns), 0])[1] += 1
    part = None  # the last one lives until the next is made, as in `decode_tiled`
    for tile_run, count in kinds.values():
        for index, frame in enumerate(features[:_DISTINCT]):
            with run.times(count * (len(features) - index if index == _DISTINCT - 1 else 1)):
                part = tile_run(frame[..., slice(*tile_run.rows[0]), slice(*tile_run.columns[0])])
                _write(out, unpatchify(part, patch).clamp(-1, 1))
        # Gone before the next tile starts, whose TileRun replaces this one there.
        tile_run.histories.clear()


def _write(out: Tensor, video: Tensor) -> None:
    frames, height, width = video.shape[2:]
    out[:, :, :frames, :height, :width] = video.to(out)


def _times(span: Span, factor: int) -> Span:
    return span[0] * factor, span[1] * factor
