"""Which stored latents belong together: every clip's high- and low-resolution ones, found before training."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from luve_lightning.data.clip_container import RefusedClip
from luve_lightning.data.clip_hashes import ClipHashes
from luve_lightning.data.clips import read_clip
from luve_lightning.data.encode_clips import plan_windows
from luve_lightning.data.latent_recipe import HIGH_RESOLUTION, LatentRecipe
from luve_lightning.data.latent_store import LatentKey, LatentStore
from luve_lightning.data.quarantine import Quarantine
from luve_lightning.data.store import StoreError
from luve_lightning.data.video_index import ClipEntry
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.functional.resize import fit_frames


@dataclass(frozen=True)
class PairEntry:
    """One window of a clip at all its resolutions.

    Attributes:
        entry: the clip.
        hr_key: of its high-resolution latents.
        lr_keys: of the low-resolution ones, by scale.
    """

    entry: ClipEntry
    hr_key: LatentKey
    lr_keys: dict[float, LatentKey]


@dataclass
class PairLookup:
    """What a lookup found.

    Attributes:
        pairs: windows whose latents are all there, in the order of the index.
        dropped: (clip id, reason) of clips that no latents are expected of: too short, shown in a way that cannot
            be reproduced, or set aside by precompute.
        uneven: clip ids of those with a variable frame rate.
    """

    pairs: list[PairEntry] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    uneven: list[str] = field(default_factory=list)


def find_pair_keys(
    store: LatentStore,
    hashes: ClipHashes,
    entries: Iterable[ClipEntry],
    recipe: LatentRecipe,
    variant: str = "plain",
    quarantine: Path | None = None,
) -> PairLookup:
    """Find the latents of clips, and refuse to go on when any are missing.

    Clips whose hash is not remembered are read once for it, and looked at once for how they are shown.

    Args:
        store: where `luve precompute` put them.
        hashes: of the clips; `ClipHashes(store.root)` is precompute's.
        entries: the clips.
        recipe: which latents; it must say what precompute's configuration said.
        variant: one of the recipe's variants.
        quarantine: the list of bad clips that precompute left; `quarantine_path` when None.

    Raises:
        StoreError: in one line, when clips lack latents without being known as bad.
    """
    if variant not in recipe.variants:
        raise ValueError(f"variant {variant!r} is not among the recipe's, {list(recipe.variants)}")
    entries = list(entries)
    windows, short = plan_windows(entries, recipe)
    # A clip that was replaced since it failed is not in the list any more, and must have latents.
    listed = Quarantine(quarantine or quarantine_path(store, recipe), max_bad_fraction=1, total=1).bad()
    bad = {os.path.realpath(clip.path): clip.reason for clip in listed}
    reasons = {error.path: error.reason for error in short}
    lookup = PairLookup()
    lacking: dict[str, ClipEntry] = {}
    for window in windows:
        try:
            pair = _find(store, hashes, window.clip, window.frames, recipe, variant)
        except RefusedClip as error:
            reasons.setdefault(window.clip.path, error.reason)
            continue
        if pair is not None:
            lookup.pairs.append(pair)
        elif (real := os.path.realpath(window.clip.path)) in bad:
            reasons.setdefault(window.clip.path, bad[real])
        else:
            lacking[window.clip.clip_id] = window.clip
    if lacking or not lookup.pairs:
        raise StoreError(_complaint(store, recipe, variant, list(lacking), len(entries)))
    lookup.uneven = [path.stem for path in hashes.uneven(dict.fromkeys(p.entry.path for p in lookup.pairs))]
    lookup.dropped = [(entry.clip_id, reasons[entry.path]) for entry in entries if entry.path in reasons]
    return lookup


def quarantine_path(store: LatentStore, recipe: LatentRecipe) -> Path:
    """Where precompute names the clips that could not be encoded.

    One list for each size and choice of frames: a clip too small or short for one recipe can do for another.
    """
    height, width = recipe.size
    name = f"{height}x{width}-{recipe.frames}-from-{recipe.start}-by-{recipe.stride}.jsonl"
    return store.root / "quarantine" / name


def _find(
    store: LatentStore,
    hashes: ClipHashes,
    clip: ClipEntry,
    frames: tuple[int, int],
    recipe: LatentRecipe,
    variant: str,
) -> PairEntry | None:
    try:
        digest = hashes.digest(clip.path)
    except OSError:
        return None
    high = recipe.key(digest, frames, HIGH_RESOLUTION, variant)
    low = {scale: recipe.key(digest, frames, scale, variant) for scale in recipe.scales}
    return PairEntry(clip, high, low) if all(map(store.has, (high, *low.values()))) else None


def _complaint(
    store: LatentStore, recipe: LatentRecipe, variant: str, lacking: Sequence[str], total: int
) -> str:
    scales = ", ".join(f"{scale:g}" for scale in recipe.scales) or "none"
    many = f"{len(lacking)} of {total} clips have no" if lacking else f"none of {total} clips has"
    which = f" (first {lacking[0]})" if lacking else ""
    of = "" if variant == "plain" else f"variant {variant}, "
    return (
        f"{many} latents in {store.root}{which} for {of}size {recipe.size[0]}x{recipe.size[1]}, "
        f"scales {scales}, {recipe.frames} frames from {recipe.start} (windows {recipe.windows}, stride "
        f"{recipe.stride}), VAE {recipe.vae[:12]}: run `luve precompute` with these values on this index"
    )


CropWindow = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def aligned_windows(
    shape: Size3d, crop: Size3d, scale: float, rng: np.random.Generator
) -> tuple[CropWindow, CropWindow]:
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

    def _read(self, key: LatentKey, window: CropWindow) -> Tensor:
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
