"""Training crops of latents at two resolutions: which windows they are, and the pixels that belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from luve_lightning.data.clip_windows import PairEntry, read_frames
from luve_lightning.data.latent_store import LatentKey, LatentStore
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.functional.pixels import fit_window

CropWindow = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class CropRule:
    """Which windows a training crop may be.

    Attributes:
        size: latent frames, height and width.
        at: the resolution whose latents `size` counts.
        frames: start at a random latent frame, or take the first ones.
    """

    size: Size3d
    at: Literal["high", "low"] = "high"
    frames: Literal["random", "first"] = "random"

    def check(self, scale: float) -> None:
        """Raise ValueError when height or width do not make whole latents at both resolutions."""
        ratio = Fraction(scale).limit_denominator(1000)
        unit = ratio.numerator if self.at == "high" else ratio.denominator
        if any(n < 1 or n % unit for n in self.size[1:]):
            raise ValueError(f"crop: height and width must be multiples of {unit} for scale {scale:g}, got {self.size}")

    def high(self, scale: float) -> Size3d:
        """The crop's size at high resolution."""
        if self.at == "high":
            return self.size
        ratio = Fraction(scale).limit_denominator(1000)
        height, width = (n // ratio.denominator * ratio.numerator for n in self.size[1:])
        return self.size[0], height, width


def aligned_windows(
    shape: Size3d, crop: CropRule, scale: float, rng: np.random.Generator
) -> tuple[CropWindow, CropWindow]:
    """A window of high-resolution latents, and the low-resolution window of the same picture.

    With scale p/q in lowest terms, positions agree only at multiples of p (high) and q (low).

    Args:
        shape: frames, height and width of the high-resolution latents.
        crop: which windows; cut to `shape`.
        scale: high over low resolution.
        rng: decides the position.

    Returns:
        ((t0, t1), (y0, y1), (x0, x1)) in high- and in low-resolution latents.

    Raises:
        ValueError: when the crop's height or width, or that of the shape, is not a multiple of p at high resolution.
    """
    ratio = Fraction(scale).limit_denominator(1000)
    p, q = ratio.numerator, ratio.denominator
    wanted = crop.high(scale)
    frames = min(wanted[0], shape[0])
    t = int(rng.integers(shape[0] - frames + 1)) if crop.frames == "random" else 0
    high: list[tuple[int, int]] = [(t, t + frames)]
    low: list[tuple[int, int]] = [(t, t + frames)]
    for name, n, want in zip(("height", "width"), shape[1:], wanted[1:], strict=True):
        extent = min(n, want)
        if extent % p or n % p:
            raise ValueError(
                f"{name}: a crop of {extent} in {n} latents is not a multiple of {p}, as scale {scale:g} needs"
            )
        start = int(rng.integers((n - extent) // p + 1))
        high.append((start * p, start * p + extent))
        low.append((start * q, start * q + extent // p * q))
    return (high[0], high[1], high[2]), (low[0], low[1], low[2])


def own_pixels(pair: PairEntry, shape: Size3d, window: CropWindow) -> Tensor:
    """The pixels that a window of a clip's high-resolution latents stands for.

    Args:
        pair: the clip, plain.
        shape: frames, height and width of its high-resolution latents.
        window: in these; starts at the first frame, since the first latent of a causal VAE is one frame, and each
            later one several.

    Returns:
        3 x T x H x W in [-1, 1].
    """
    assert window[0][0] == 0
    key = pair.hr_key
    per_latent = (key.count - 1) // max(1, shape[0] - 1)
    wanted = 1 + (window[0][1] - 1) * per_latent
    pixels = torch.from_numpy(read_frames(pair.entry, key, wanted))
    rows, columns = (
        (a * size // n, b * size // n) for (a, b), size, n in zip(window[1:], key.size, shape[1:], strict=True)
    )
    # The same crop and resize as in precompute, so that pixels and latents show the same picture.
    return fit_window(pixels, key.size, rows, columns)


def in_single(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample or a batch whose latents, "hr" and "lr", are float32, the same numbers."""
    return sample | {name: sample[name].float() for name in ("hr", "lr")}


class LatentPairCrops(Dataset[dict[str, Any]]):
    """Random aligned crops, addressed by `SampleKey`s (index, kind = scale, seed).

    Latents are float32. A DataLoader takes them as they are stored, half as large: its processes hand them over in
    shared memory, which can take longer than a training step. LatentPairsDataModule makes them float32 on the device.

    Args:
        store: the latents.
        pairs: pairs to draw from.
        scales: scales in the order of kinds.
        crop: which windows.
        preload: keep all latents in memory.
        video_crop: latent frames, height and width of the window whose own pixels come with each crop, at high
            resolution; cut to the crop. None brings no pixels.
        numbers: number of each pair's bucket, which a sample then brings; None where all have one size.
    """

    def __init__(
        self,
        store: LatentStore,
        pairs: Sequence[PairEntry],
        scales: Sequence[float],
        crop: CropRule,
        preload: bool = False,
        video_crop: Size3d | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self.store, self.pairs, self.scales, self.crop = store, list(pairs), list(scales), crop
        self.video_crop = video_crop
        self.numbers = None if numbers is None else list(numbers)
        self.loaded: dict[LatentKey, Tensor] = {}
        if preload:
            for pair in self.pairs:
                for key in (pair.hr_key, *(pair.lr_keys[scale] for scale in self.scales)):
                    self.loaded[key] = store.read(key)

    def __len__(self) -> int:
        return len(self.pairs)

    def _read(self, key: LatentKey, window: CropWindow) -> Tensor:
        t, y, x = window
        if key in self.loaded:
            return self.loaded[key][:, slice(*t), slice(*y), slice(*x)]
        return self.store.read(key, t, y, x)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        return in_single(self._stored(key))

    def __getitems__(self, keys: Sequence[Any]) -> list[dict[str, Any]]:
        """The samples of a DataLoader's batch, latents as they are stored."""
        return [self._stored(key) for key in keys]

    def _stored(self, key: Any) -> dict[str, Any]:
        pair, scale = self.pairs[key.index], self.scales[key.kind]
        rng = np.random.default_rng(list(key.seed))
        shape = self.shape(pair)
        high, low = aligned_windows(shape, self.crop, scale, rng)
        item = {
            "hr": self._read(pair.hr_key, high),
            "lr": self._read(pair.lr_keys[scale], low),
            "scale": torch.tensor(scale),
            "clip_id": pair.entry.clip_id,
        }
        if self.numbers is not None:
            item["bucket"] = torch.tensor(self.numbers[key.index])
        if self.video_crop is not None:
            # Drawn after the crop, whose position does not depend on whether pixels are wanted.
            t, y, x = self._window(high, self.video_crop, rng)
            item["window"] = torch.tensor((t, y, x))
            (top, _), (left, _) = high[1:]
            item["video"] = own_pixels(pair, shape, (t, (top + y[0], top + y[1]), (left + x[0], left + x[1])))
        return item

    @staticmethod
    def _window(crop: CropWindow, size: Size3d, rng: np.random.Generator) -> CropWindow:
        """Where in a crop the pixels are wanted: its first frames, anywhere in height and width."""
        window = [(0, min(size[0], crop[0][1] - crop[0][0]))]
        for (start, stop), wanted in zip(crop[1:], size[1:], strict=True):
            extent = min(wanted, stop - start)
            first = int(rng.integers(stop - start - extent + 1))
            window.append((first, first + extent))
        return window[0], window[1], window[2]

    def shape(self, pair: PairEntry) -> Size3d:
        """Frames, height and width of a pair's high-resolution latents."""
        loaded = self.loaded.get(pair.hr_key)
        shape = self.store.shape(pair.hr_key) if loaded is None else loaded.shape
        return shape[1], shape[2], shape[3]
