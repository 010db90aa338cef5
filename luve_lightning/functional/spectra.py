"""Spatial frequencies of frames or latents: radially averaged power spectra, and what a coarser pixel grid can hold.

Frequencies are in cycles per sample (a pixel, or a cell of a latent grid); the Nyquist frequency is 1/2. Every
coefficient of the 2-D transform counts, so the powers of all rings and of the corners beyond Nyquist add up to the
mean square (Parseval).

Bands between grids are those of the cosine transform (DCT-II): a picture continues as its mirror image, so its borders
add no frequencies. A grid of h x w pixels over the same picture holds exactly the lowest h x w cosines; what is beyond
them no picture of that size can show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from luve_lightning.functional.pixels import described

Window = Literal["hann"]

# Number of values transformed at once; bounds the copies of a 4K clip.
_VALUES_AT_ONCE = 2**24
_LUMA = (0.2126, 0.7152, 0.0722)  # BT.709's, for values as stored
_ROUNDING = 1e-9


@dataclass(frozen=True)
class RadialSpectrum:
    """Power over rings of spatial frequencies, float64, on the device of the input.

    Ring k holds the frequencies nearest to radius k/n cycles per sample, up to Nyquist; n is the longer side.

    Attributes:
        frequency: shape (K,), K = n // 2 + 1: the rings' radii, rising from 0; the last is Nyquist for even n.
        density: ... x K: mean of |X|^2 / (H W) over a ring's coefficients; white noise has its variance in each ring.
        area: shape (K,): each ring's share of all coefficients, so that density x area is power.
        corners: shape ...: power of the diagonal frequencies beyond Nyquist, which are in no ring.
    """

    frequency: Tensor
    density: Tensor
    area: Tensor
    corners: Tensor

    @property
    def power(self) -> Tensor:
        """Each ring's part of the mean square, ... x K."""
        return self.density * self.area

    def mean(self) -> RadialSpectrum:
        """Averaged over everything but the rings: density of shape (K,), corners a scalar."""
        return RadialSpectrum(
            self.frequency, self.density.reshape(-1, len(self.frequency)).mean(0), self.area, self.corners.mean()
        )


def radial_spectrum(video: Tensor, window: Window | None = None) -> RadialSpectrum:
    """Radially averaged power spectral density of each frame, averaged over time.

    Transformed in float32 (float64 stays) and summed in float64. A frame's mean is subtracted first and added back
    as the power of frequency 0, so that rounding of a large mean does not drown high frequencies.

    Args:
        video: B x C x T x H x W, pixels or latents of any floating type and size.
        window: "hann" tapers the frames (scaled to a mean square of 1), so that the jump between opposite borders does
            not count as high frequencies; None takes frames as periodic, and Parseval's equation holds.

    Returns:
        Spectra of shape B x C, in the square of `video`'s unit.

    Raises:
        ValueError: for another shape or type, no values, or an unknown window.
    """
    if video.ndim != 5 or not video.is_floating_point() or video.numel() == 0:
        shape = " x ".join(map(str, video.shape))
        raise ValueError(f"spectra are of floating point B x C x T x H x W, got {video.dtype} {shape}")
    batch, channels, frames, height, width = video.shape
    at_once = max(1, _VALUES_AT_ONCE // (batch * channels * height * width))
    parts = (part.double() if video.dtype == torch.float64 else part.float() for part in video.split(at_once, 2))
    return _rings(_power(parts, window) / frames, height, width)


def luma_spectrum(frames: Tensor, window: Window | None = "hann") -> RadialSpectrum:
    """`radial_spectrum` of a video's brightness.

    Args:
        frames: uint8 T x H x W x 3, sRGB; luma is BT.709's weighted sum of the stored values, in [0, 1].
        window: see `radial_spectrum`.

    Returns:
        One spectrum: density of shape (K,), corners a scalar.
    """
    if frames.ndim != 4 or frames.dtype != torch.uint8 or frames.shape[-1] != 3 or frames.numel() == 0:
        raise ValueError(f"expected uint8 T x H x W x 3, got {frames.dtype} {' x '.join(map(str, frames.shape))}")
    count, height, width, _ = frames.shape
    weights = torch.tensor(_LUMA, device=frames.device) / 255
    at_once = max(1, _VALUES_AT_ONCE // (3 * height * width))
    parts = ((part.float() @ weights)[None, None] for part in frames.split(at_once))
    return _rings(_power(parts, window) / count, height, width).mean()


def band_power(spectrum: RadialSpectrum, edges: Sequence[float]) -> Tensor:
    """Power in bands of frequencies, each a part of the mean square.

    Band i holds the rings at edges[i] < f <= edges[i+1]. Frequency 0 is in none; a band that ends at 1 includes
    the corners beyond Nyquist. So edges from 0 to 1 split the whole variance.

    Args:
        spectrum: spectrum of K rings.
        edges: rising fractions of Nyquist, in [0, 1], at least two.

    Returns:
        float64, ... x (len(edges) - 1).

    Raises:
        ValueError: for other edges, or when the frames are too small for a band to hold any ring.
    """
    check_edges(edges)
    place = spectrum.frequency * 2
    powers = []
    for low, high in pairwise(edges):
        inside = (place > low + _ROUNDING) & (place <= high + _ROUNDING)
        if not inside.any():
            raise ValueError(
                f"no frequency of these frames lies between {low:g} and {high:g} of Nyquist: "
                f"they have {len(place) - 1} beside 0; take fewer or wider bands"
            )
        power = spectrum.power[..., inside].sum(-1)
        powers.append(power + spectrum.corners if high >= 1 else power)
    return torch.stack(powers, -1)


def band_density(spectrum: RadialSpectrum, edges: Sequence[float]) -> Tensor:
    """Mean density over the coefficients of each band of `band_power`; same arguments, shape and errors."""
    ones = replace(spectrum, density=torch.ones_like(spectrum.frequency), corners=1 - spectrum.area.sum())
    return band_power(spectrum, edges) / band_power(ones, edges)


def check_edges(edges: Sequence[float]) -> None:
    """Refuse edges that are not rising fractions of Nyquist.

    Raises:
        ValueError: names the edges.
    """
    rising = all(low < high for low, high in pairwise(edges))
    if len(edges) < 2 or not rising or not (edges[0] >= 0 and edges[-1] <= 1):
        raise ValueError(f"edges: expected at least two rising fractions of Nyquist in [0, 1], got {list(edges)}")


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


def _power(parts: Iterator[Tensor], window: Window | None) -> Tensor:
    """Sum over all frames of |X|^2 / (H W) in the half plane of a real transform, float64 B x C x H x (W // 2 + 1)."""
    if window not in (None, "hann"):
        raise ValueError(f"window: expected hann or none, got {window!r}")
    total: Tensor | None = None
    for frames in parts:
        height, width = frames.shape[-2:]
        mean = frames.mean((-2, -1), keepdim=True, dtype=torch.float64)
        values = frames - mean.to(frames.dtype)
        # What rounding left in the subtraction belongs to frequency 0, too.
        rest = values.mean((-2, -1), dtype=torch.float64)
        if window == "hann":
            values = values * _hann(height, values)[:, None] * _hann(width, values)
        transformed = torch.fft.rfft2(values, norm="ortho")
        power = transformed.real.square().add_(transformed.imag.square()).sum(2, dtype=torch.float64)
        if window is None:
            power[..., 0, 0] = 0
        constant = mean[..., 0, 0].to(frames.dtype) + rest
        power[..., 0, 0] += constant.square().sum(2) * (height * width)
        total = power if total is None else total + power
    assert total is not None
    return total


def _hann(length: int, like: Tensor) -> Tensor:
    taper = torch.hann_window(length, periodic=True, dtype=torch.float64, device=like.device)
    return (taper / taper.square().mean().sqrt()).to(like.dtype)


def _rings(power: Tensor, height: int, width: int) -> RadialSpectrum:
    """Average the half plane's densities, B x C x H x (W // 2 + 1), over rings."""
    device, longer = power.device, max(height, width)
    rings = longer // 2 + 1
    y = torch.arange(height, device=device)
    y = torch.minimum(y, height - y)[:, None]
    x = torch.arange(width // 2 + 1, device=device)
    # Integers decide what is beyond Nyquist, so rounding moves no coefficient that lies on it.
    beyond = 4 * ((y * width) ** 2 + (x * height) ** 2) > (height * width) ** 2
    radius = torch.sqrt((y / height).double() ** 2 + (x / width).double() ** 2) * longer
    ring = (radius + 0.5).floor().long().clamp(max=rings - 1).masked_fill(beyond, rings).flatten()
    # The half plane stands for the whole: all columns count twice, except the first and Nyquist's.
    twice = torch.full((width // 2 + 1,), 2.0, dtype=torch.float64, device=device)
    twice[0] = 1
    if width % 2 == 0:
        twice[-1] = 1
    weights = twice.expand(height, -1).flatten()
    count = torch.zeros(rings + 1, dtype=torch.float64, device=device).index_add_(0, ring, weights)
    rows = power.flatten(2) * weights
    sums = rows.new_zeros(*rows.shape[:2], rings + 1).index_add_(2, ring, rows)
    return RadialSpectrum(
        frequency=torch.arange(rings, dtype=torch.float64, device=device) / longer,
        density=sums[..., :-1] / count[:-1],
        area=count[:-1] / (height * width),
        corners=sums[..., -1] / (height * width),
    )


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
