"""VLUer's encoder: latents to features on the same grid."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualPair(nn.Module):
    """x + Conv(SiLU(Conv(x))), 3x3x3, no normalisation (latents are normalised already).

    The second convolution starts at zero, so a deep stack starts as the identity.

    Args:
        channels: of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """B x C x T x h x w to the same."""
        return x + self.conv2(F.silu(self.conv1(x)))


class Encoder(nn.Module):
    """A convolution into `channels`, then residual pairs.

    The released model's encoder attends in windows of (6, 8, 8) (VRT); convolutions of 3x3x3 hold as many weights
    and run at the arithmetic limit of the GPU. See `luve bench vluer`.

    Args:
        in_channels: latent channels.
        channels: feature channels.
        pairs: residual pairs.
    """

    def __init__(self, in_channels: int, channels: int, pairs: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv3d(in_channels, channels, 3, padding=1)
        self.pairs = nn.ModuleList(ResidualPair(channels) for _ in range(pairs))

    def forward(self, latents: Tensor) -> Tensor:
        """B x in_channels x T x h x w to B x channels x T x h x w."""
        x = self.conv_in(latents)
        for pair in self.pairs:
            x = pair(x)
        return x
