"""Pairs of latents of one clip at two resolutions."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from luve_lightning.datasets.clips import read_clip
from luve_lightning.datasets.latent_key import LatentKey
from luve_lightning.datasets.latent_pairs_index import PairEntry
from luve_lightning.datasets.latent_store import LatentStore
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.functional.resize import fit_frames

Window = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def aligned_windows(
    shape: Size3d, crop: Size3d, scale: float, rng: np.random.Generator
) -> tuple[Window, Window]:
    """A random window of high-resolution latents and the low-resolution window that covers the same picture.

    With scale p/q in lowest terms, positions agree at multiples of p (high) and q (low) only.

    Args:
        shape: frames, height and width of the high-resolution latents.
        crop: frames, height and width of the window; cut to `shape`. Height and width multiples of p.
        scale: high over low resolution.
        rng: decides the position.

    Returns:
        ((t0, t1), (y0, y1), (x0, x1)) in high- and in low-resolution latents.

    Raises:
        ValueError: when the crop or the shape is not a multiple of p.
    """
    ratio = Fraction(scale).limit_denominator(1000)
    p, q = ratio.numerator, ratio.denominator
    frames = min(crop[0], shape[0])
    t = int(rng.integers(shape[0] - frames + 1))
    high: list[tuple[int, int]] = [(t, t + frames)]
    low: list[tuple[int, int]] = [(t, t + frames)]
    for name, n, want in zip(("height", "width"), shape[1:], crop[1:], strict=True):
        extent = min(n, want)
        if extent % p or n % p:
            raise ValueError(
                f"{name}: a crop of {extent} in {n} latents is not a multiple of {p}, as scale {scale:g} needs"
            )
        start = int(rng.integers((n - extent) // p + 1))
        high.append((start * p, start * p + extent))
        low.append((start * q, start * q + extent // p * q))
    return (high[0], high[1], high[2]), (low[0], low[1], low[2])


class LatentPairCrops(Dataset[dict[str, Any]]):
    """Random aligned crops, addressed by `SampleKey`s (index, bucket = scale, seed).

    Args:
        store: the latents.
        pairs: what to draw from.
        scales: in bucket order.
        crop: high-resolution latent frames, height and width.
        preload: keep all latents in memory.
    """

    def __init__(
        self,
        store: LatentStore,
        pairs: Sequence[PairEntry],
        scales: Sequence[float],
        crop: Size3d,
        preload: bool = False,
    ) -> None:
        self.store, self.pairs, self.scales, self.crop = store, list(pairs), list(scales), crop
        self.loaded: dict[LatentKey, Tensor] = {}
        if preload:
            for pair in self.pairs:
                for key in (pair.hr_key, *(pair.lr_keys[scale] for scale in self.scales)):
                    self.loaded[key] = store.read(key)

    def __len__(self) -> int:
        return len(self.pairs)

    def _read(self, key: LatentKey, window: Window) -> Tensor:
        t, y, x = window
        if key in self.loaded:
            return self.loaded[key][:, slice(*t), slice(*y), slice(*x)].float()
        return self.store.read(key, t, y, x).float()

    def __getitem__(self, key: Any) -> dict[str, Any]:
        pair, scale = self.pairs[key.index], self.scales[key.bucket]
        rng = np.random.default_rng(list(key.seed))
        shape = (
            self.loaded[pair.hr_key].shape if pair.hr_key in self.loaded else self.store.shape(pair.hr_key)
        )
        high, low = aligned_windows((shape[1], shape[2], shape[3]), self.crop, scale, rng)
        return {
            "hr": self._read(pair.hr_key, high),
            "lr": self._read(pair.lr_keys[scale], low),
            "scale": torch.tensor(scale),
            "clip_id": pair.entry.clip_id,
        }


class WholeLatentPairs(Dataset[dict[str, Any]]):
    """Whole latents with the clip's own pixels, every clip at every scale: what evaluation sees.

    Items of one scale stand together, clips in the index's order.

    Args:
        store: the latents.
        pairs: clips.
        scales: scales to evaluate.
        limit: at most this many clips; None takes all.
    """

    def __init__(
        self,
        store: LatentStore,
        pairs: Sequence[PairEntry],
        scales: Sequence[float],
        limit: int | None = None,
    ) -> None:
        self.store = store
        self.items = [(pair, scale) for scale in scales for pair in list(pairs)[:limit]]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair, scale = self.items[index]
        start, stop = pair.hr_key.frames
        stride = pair.hr_key.stride
        frames = read_clip(pair.entry.path, start, (stop - start - 1) // stride + 1, stride=stride)
        # The same crop and resize as precompute's, so that pixels and latents show the same picture.
        video = fit_frames(torch.from_numpy(frames), pair.hr_key.size)
        return {
            "hr": self.store.read(pair.hr_key).float(),
            "lr": self.store.read(pair.lr_keys[scale]).float(),
            "video": video,
            "scale": torch.tensor(scale),
            "clip_id": pair.entry.clip_id,
        }
