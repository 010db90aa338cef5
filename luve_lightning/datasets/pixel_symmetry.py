"""Variants of a clip by the symmetries of pictures: more to train on where clips are few."""

from __future__ import annotations

from torch import Tensor

from luve_lightning.datasets.encode_clips import PixelTransform


class Symmetry(PixelTransform):
    """Mirrors, transposes, reverses time, inverts or permutes colours.

    A VAE is not equivariant to any of these, so they cannot be applied to latents; each is a variant of its own.

    Args:
        mirror: swap left and right.
        transpose: swap rows and columns; frames must be square.
        reverse: last frame first.
        negative: invert brightness.
        colors: which channel goes where, a permutation of "rgb".
    """

    def __init__(
        self,
        mirror: bool = False,
        transpose: bool = False,
        reverse: bool = False,
        negative: bool = False,
        colors: str = "rgb",
    ) -> None:
        super().__init__()
        if sorted(colors) != sorted("rgb"):
            raise ValueError(f"colors: expected a permutation of rgb, got {colors!r}")
        self.mirror, self.transpose, self.reverse, self.negative = mirror, transpose, reverse, negative
        self.colors = colors

    def label(self) -> str:
        """What is done, in the order it is done."""
        flags = ("mirror", "transpose", "reverse", "negative")
        return " ".join([name for name in flags if getattr(self, name)] + [self.colors])

    def forward(self, video: Tensor) -> Tensor:
        """B x 3 x T x H x W to the same shape."""
        if self.mirror:
            video = video.flip(4)
        if self.transpose:
            if video.shape[3] != video.shape[4]:
                raise ValueError(f"transpose needs square frames, got {video.shape[3]}x{video.shape[4]}")
            video = video.transpose(3, 4)
        if self.reverse:
            video = video.flip(2)
        if self.negative:
            video = -video
        return video[:, ["rgb".index(c) for c in self.colors]].contiguous()
