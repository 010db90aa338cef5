"""Running a chain of AutoencoderKLWan's layers on a part of the frame, frame chunk by frame chunk, exactly.

Every layer but the mid block's attention is local: a residual block sees 2 positions around (two 3x3x3
convolutions), a resampling or single convolution 1, and the norms only one position (RMS over channels). A tile is
therefore exact when each layer gets everything that its wanted output depends on (`needed`), and when its output
beyond that, wrong because of the zeros with which its convolutions pad a tile, is cropped away (`TileRun`). Where
the tile ends with the frame, those zeros are the untiled form's padding. Cropping after each layer keeps the halo
small: about 8 positions at the finest resolution instead of the whole chain's at the coarsest.

In time the layers are causal. They keep the frames they look back on in a history per tile: the list that
diffusers' blocks take as `feat_cache`, but held here and not on the VAE, so two threads may share one VAE.

Shapes: x is B x C x T x H x W throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample, WanResidualBlock
from torch import Tensor, cat, nn

# Positions [start, stop) along the height or the width of a frame.
Span = tuple[int, int]

DEFAULT_TILE = (64, 64)  # latents, 512x512 pixels: smaller tiles save nothing at 4K
EVERYWHERE = 2**40  # the reach of a layer that needs the whole frame
BEFORE = 2  # frames that a causal convolution of kernel 3 looks back on


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
        """The input that an output depends on.

        Args:
            wanted: positions of the output.
            size: height or width of the input's whole frame, where a span ends.
        """
        start, stop = wanted
        if self.down:
            return 2 * start, min(size, 2 * stop + 1)
        scale = 2 if self.up else 1
        return max(0, start - self.reach) // scale, min(size, math.ceil((stop + self.reach) / scale))

    def history(self) -> list[Any]:
        """The object to pass to `__call__` with the first chunk, and again with each next one."""
        return [None] * sum(isinstance(module, WanCausalConv3d) for module in self.module.modules())

    def __call__(self, x: Tensor, history: list[Any]) -> Tensor:
        """The layer's output for a chunk of frames.

        Args:
            x: frames that follow those of the last call with this history; one frame in the first call.
            history: see `history`; changed in place.
        """
        if not isinstance(self.module, WanCausalConv3d):
            return self.module(x, feat_cache=history, feat_idx=[0])
        if self.activation is not None:
            x = self.activation(x)
        [past] = history
        last = x[:, :, -BEFORE:]
        short = past is not None and last.shape[2] < BEFORE
        history[0] = cat([past[:, :, -1:], last], dim=2) if short else last.clone()
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

    def __call__(self, frames: Tensor) -> Tensor:
        """Run a chunk.

        Args:
            frames: the next frames of the tile, the spans `rows[0]` and `columns[0]` of the first layer's input.

        Returns:
            The last layer's output in the spans `rows[-1]` and `columns[-1]`.
        """
        x = frames
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
        raise ValueError(
            "this VAE has Wan2.2's residual blocks (is_residual=True); expected a Wan2.1 AutoencoderKLWan"
        )
