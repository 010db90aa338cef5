"""VLUer's decoder: mixes neighbouring queries, which a pointwise MLP cannot."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Decoder(nn.Module):
    """A few 3x3x3 convolutions at the output resolution.

    The last one starts at zero, so that an untrained VLUer is exactly its interpolation.

    Args:
        channels: of the queries.
        out_channels: latent channels.
        layers: residual convolutions before the last one.
    """

    def __init__(self, channels: int, out_channels: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv3d(channels, channels, 3, padding=1) for _ in range(layers))
        self.conv_out = nn.Conv3d(channels, out_channels, 3, padding=1)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """B x channels x T x H x W to B x out_channels x T x H x W."""
        for layer in self.layers:
            x = x + F.silu(layer(x))
        return self.conv_out(F.silu(x))
