"""The part of a picture that a coarser pixel grid can hold, the rest, and everything in between.

Bands are those of the cosine transform (DCT-II): a picture continues as its mirror image, so its borders add no
frequencies. A grid of h x w pixels over the same picture holds exactly the lowest h x w cosines; what is beyond them
no picture of that size can show.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from luve_lightning.functional.pixels import described

_LUMA = (0.2126, 0.7152, 0.0722)  # BT.709's, for values as stored


def luma_of(frames: Tensor) -> Tensor:
    """Brightness of frames: BT.709's weighted sum of the stored values.

    Args:
        frames: uint8 T x H x W x 3, sRGB.

    Returns:
        float32 T x H x W in [0, 1].
    """
    red, green, blue = (weight / 255 * frames[..., channel].float() for channel, weight in enumerate(_LUMA))
    return red + green + blue  # not a product of matrices, which may be TF32


def cosine_coefficients(pictures: Tensor) -> Tensor:
    """Orthonormal cosine transform (DCT-II) of pictures: the sum of squares stays.

    Args:
        pictures: floating point ... x H x W.

    Returns:
        float32 (float64 stays), same shape; the coefficient of the mean comes first.
    """
    height, width = _sides(pictures)
    spectrum = torch.fft.rfft2(_mirrored(pictures))[..., :height, :width]
    spectrum *= _turn(height, pictures, -0.5)[:, None] * _turn(width, pictures, -0.5)
    coefficients = spectrum.real / (2 * math.sqrt(height * width))
    coefficients[..., 0, :] /= math.sqrt(2)
    coefficients[..., 0] /= math.sqrt(2)
    return coefficients


def between_grids(pictures: Tensor, inner: tuple[int, int] | None, outer: tuple[int, int] | None = None) -> Tensor:
    """What a grid can hold and a coarser one cannot, at the size of the pictures.

    Args:
        pictures: floating point ... x H x W.
        inner: rows and columns of the coarser grid; None keeps the lowest frequencies, too.
        outer: rows and columns of the finer one; None is the pictures' own.

    Returns:
        float32 (float64 stays), same shape.
    """
    height, width = _sides(pictures)
    spectrum = torch.fft.rfft2(_mirrored(pictures))
    if outer is not None:
        rows, columns = (min(grid, side) for grid, side in zip(outer, (height, width), strict=True))
        spectrum[..., rows : 2 * height - rows + 1, :] = 0
        spectrum[..., columns:] = 0
    if inner is not None:
        rows, columns = inner
        spectrum[..., :rows, :columns] = 0
        if rows > 1:
            spectrum[..., 1 - rows :, :columns] = 0
    return torch.fft.irfft2(spectrum, s=(2 * height, 2 * width))[..., :height, :width]


def _sides(pictures: Tensor) -> tuple[int, int]:
    if not pictures.is_floating_point() or pictures.ndim < 2 or pictures.numel() == 0:
        raise ValueError(f"pictures: expected floating point ... x H x W, got {described(pictures)}")
    return pictures.shape[-2], pictures.shape[-1]


def _mirrored(pictures: Tensor) -> Tensor:
    exact = pictures if pictures.dtype == torch.float64 else pictures.float()
    wide = torch.cat([exact, exact.flip(-1)], -1)
    return torch.cat([wide, wide.flip(-2)], -2)


def _turn(length: int, like: Tensor, samples: float) -> Tensor:
    """Phases that move a mirrored line of 2 x length pixels by some samples."""
    angle = samples * math.pi / length * torch.arange(length, dtype=torch.float64, device=like.device)
    dtype = torch.complex128 if like.dtype == torch.float64 else torch.complex64
    return torch.polar(torch.ones_like(angle), angle).to(dtype)
