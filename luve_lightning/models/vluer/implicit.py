"""VLUer's implicit upsampler: features queried at continuous space-time coordinates.

The paper's form unfolds features over 3x3x3 neighbours, samples the nearest position of each query, concatenates
relative coordinates and cell size, and applies an MLP. Its first layer is linear, so it splits exactly:

    W [unfold(F)[k(q)], offset(q), cell] + b  =  conv3d(F)[k(q)] + W_t offset_t + W_y offset_y + W_x offset_x + const

The convolution runs once per input position instead of once per query, which divides its cost by the product of the
scales, and the coordinate columns are three tables of one dimension each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luve_lightning.functional.coordinates import cell_size, nearest_indices, relative_offsets
from luve_lightning.functional.interpolation import Size3d


class ImplicitUpsampler(nn.Module):
    """An MLP over (nearest 3x3x3 features, relative coordinates, cell size).

    Args:
        channels: feature channels C.
        hidden: width of the MLP.
        layers: hidden-to-hidden layers after the first.
        out_channels: D.
        use_cell: give the MLP the size of the query's cell (LIIF's cell decoding); without it the output at a point
            does not know the scale.
        query_chunk: without gradients, queries a chunk; bounds memory and changes nothing else.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        layers: int,
        out_channels: int,
        use_cell: bool = True,
        query_chunk: int = 2**18,
    ) -> None:
        super().__init__()
        self.first = nn.Conv3d(channels, hidden, 3, padding=1)
        # Columns: offset t, y, x, then cell t, y, x.
        self.coordinates = nn.Linear(6 if use_cell else 3, hidden, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.last = nn.Linear(hidden, out_channels)
        self.use_cell, self.query_chunk = use_cell, query_chunk

    def _axis_tables(
        self, n_in: Size3d, n_out: Size3d, device: torch.device, dtype: torch.dtype
    ) -> list[Tensor]:
        """For each axis, what every output position adds to the first layer: (n, hidden)."""
        weight = self.coordinates.weight.to(torch.float32)
        tables = []
        for axis in range(3):
            offsets = relative_offsets(n_in[axis], n_out[axis], device)
            table = offsets[:, None] * weight[:, axis]
            if self.use_cell:
                table = table + cell_size(n_in[axis], n_out[axis]) * weight[:, 3 + axis]
            tables.append(table.to(dtype))
        return tables

    def _query(self, x: Tensor) -> Tensor:
        x = F.silu(x)
        for layer in self.hidden:
            x = F.silu(layer(x))
        return self.last(x)

    def forward(self, features: Tensor, size: Size3d) -> Tensor:
        """Query every position of an output grid.

        Args:
            features: B x C x T x h x w.
            size: output frames, height, width, each >= 1.

        Returns:
            B x D x size.
        """
        n_in: Size3d = (features.shape[2], features.shape[3], features.shape[4])
        device = features.device
        first = self.first(features).permute(0, 2, 3, 4, 1)
        add_t, add_y, add_x = self._axis_tables(n_in, size, device, first.dtype)
        index_t, index_y, index_x = (nearest_indices(i, o, device) for i, o in zip(n_in, size, strict=True))
        plane = add_y[:, None] + add_x

        frames_per_chunk = size[0]
        if not torch.is_grad_enabled():
            frames_per_chunk = max(1, self.query_chunk // (size[1] * size[2] * features.shape[0]))
        chunks = []
        for start in range(0, size[0], frames_per_chunk):
            t = slice(start, start + frames_per_chunk)
            x = first.index_select(1, index_t[t]).index_select(2, index_y).index_select(3, index_x)
            x = x + (add_t[t, None, None] + plane)
            chunks.append(self._query(x))
        out = chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1)
        # Channels come last in memory, which is what the decoder's convolutions run fastest on.
        return out.permute(0, 4, 1, 2, 3)
