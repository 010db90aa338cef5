"""Pairs of latents of one clip at two resolutions, for training the VLUer."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from luve_lightning.data.clip_windows import PairEntry, find_pair_keys
from luve_lightning.data.clips import read_clip
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.latent_store import LatentKey, LatentRecipe, LatentStore
from luve_lightning.data.video_index import Limits, Split, VideoIndex
from luve_lightning.datamodules.base import (
    ResumableDataModule,
    check_clip_limits,
    open_index,
    tell_lookup,
    vae_fingerprint,
)
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.functional.pixels import fit_frames

CropWindow = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def aligned_windows(
    shape: Size3d, crop: Size3d, scale: float, rng: np.random.Generator
) -> tuple[CropWindow, CropWindow]:
    """A random window of high-resolution latents, and the low-resolution window of the same picture.

    With scale p/q in lowest terms, positions agree only at multiples of p (high) and q (low).

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
        pairs: pairs to draw from.
        scales: scales in bucket order.
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
        loaded = self.loaded.get(pair.hr_key)
        shape = self.store.shape(pair.hr_key) if loaded is None else loaded.shape
        high, low = aligned_windows((shape[1], shape[2], shape[3]), self.crop, scale, rng)
        return {
            "hr": self._read(pair.hr_key, high),
            "lr": self._read(pair.lr_keys[scale], low),
            "scale": torch.tensor(scale),
            "clip_id": pair.entry.clip_id,
        }


class WholeLatentPairs(Dataset[dict[str, Any]]):
    """Whole latents with the clip's own pixels, every clip at every scale, for evaluation.

    Items of one scale stand together, clips in the index's order.

    Args:
        store: the latents.
        pairs: clips.
        scales: scales to evaluate.
        limit: at most this many clips; None takes all.
    """

    def __init__(
        self, store: LatentStore, pairs: Sequence[PairEntry], scales: Sequence[float], limit: int | None = None
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
        # The same crop and resize as in precompute, so that pixels and latents show the same picture.
        video = fit_frames(torch.from_numpy(frames), pair.hr_key.size)
        return {
            "hr": self.store.read(pair.hr_key).float(),
            "lr": self.store.read(pair.lr_keys[scale]).float(),
            "video": video,
            "scale": torch.tensor(scale),
            "clip_id": pair.entry.clip_id,
        }


class LatentPairsDataModule(ResumableDataModule):
    """Random aligned crops of precomputed latents; whole latents with their pixels for validation and test.

    Reads what `luve precompute` wrote with the same index, store, backbone, size, scales and frames; each training
    batch has one scale.

    Args:
        index: CSV with UltraVideo's columns.
        store: folder of latents.
        backbone: backbone folder or hub id whose VAE made them.
        size: height and width of the high-resolution pixels.
        scales: high over low resolution, each > 1.
        frames: frames of each encoded window, 4k + 1.
        windows: windows per training clip; validation and test take the first.
        stride: every stride-th frame.
        crop: latent frames, height and width of a training crop at high resolution.
        val_limit: at most this many validation clips at each scale.
        test_limit: at most this many test clips at each scale.
        variants: stored versions of the clips to train on, as precompute names them; validation and test use plain
            ones.
        passes: visits of each training window per epoch.
        preload: keep the training latents in memory.
        keep: which clips of the index to take.
        batch_size: see ResumableDataModule.
        num_workers: see ResumableDataModule.
        seed: see ResumableDataModule.
    """

    def __init__(
        self,
        index: Path,
        store: Path,
        backbone: str,
        size: tuple[int, int],
        scales: list[float],
        frames: int,
        windows: int = 1,
        stride: int = 1,
        crop: tuple[int, int, int] = (11, 60, 60),
        val_limit: int | None = None,
        test_limit: int | None = None,
        variants: tuple[str, ...] = ("plain",),
        passes: int = 1,
        preload: bool = False,
        keep: Limits = Limits(),  # noqa: B008  # frozen
        batch_size: int = 2,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if not scales:
            raise ValueError("scales: expected at least one")
        for scale in scales:
            unit = Fraction(scale).limit_denominator(1000).numerator
            if any(n < 1 or n % unit for n in crop[1:]):
                raise ValueError(f"crop: height and width must be multiples of {unit} for scale {scale:g}, got {crop}")
        self.keep = keep
        self.index_path, self.store, self.backbone = Path(index), LatentStore(store), backbone
        self.size, self.scales, self.frames = size, list(scales), frames
        self.windows, self.stride, self.crop = windows, stride, crop
        check_clip_limits(val_limit=val_limit, test_limit=test_limit)
        self.val_limit, self.test_limit = val_limit, test_limit
        self.variants = tuple(variants)
        self.passes, self.preload = passes, preload
        self.pairs: dict[str, list[PairEntry]] = {}

    def _find(self, index: VideoIndex, split: Split, fingerprint: str) -> list[PairEntry]:
        variants = self.variants if split == "train" else ("plain",)
        recipe = LatentRecipe(
            vae=fingerprint,
            size=self.size,
            scales=tuple(self.scales),
            frames=self.frames,
            windows=self.windows if split == "train" else 1,
            stride=self.stride,
            variants=variants,
        )
        hashes, entries, pairs = ClipHashes(self.store.root), self.clips_of(index, split), []
        for variant in variants:
            lookup = find_pair_keys(self.store, hashes, entries, recipe, variant)
            tell_lookup(split, lookup)
            pairs += lookup.pairs
        return pairs

    def open_splits(self, *splits: Split) -> None:
        """Look up every latent; for a missing one, raise an error that says how to make it."""
        missing = [split for split in splits if split not in self.pairs]
        if not missing:
            return
        index = open_index(self.index_path, self.keep)
        fingerprint = vae_fingerprint(self.backbone, self.store.root)
        for split in missing:
            self.pairs[split] = self._find(index, split, fingerprint)
        if "train" in missing:
            train = self.pairs["train"]
            self.crops = LatentPairCrops(self.store, train, self.scales, self.crop, self.preload)

    def clip_counts(self) -> dict[str, int]:
        """Clips of each split; see ResumableDataModule."""
        limits = {"val": self.val_limit, "test": self.test_limit}
        clips = {split: len({pair.entry.clip_id for pair in pairs}) for split, pairs in self.pairs.items()}
        return {split: min(count, limits.get(split) or count) for split, count in clips.items()}

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of {"hr", "lr", "scale", "clip_id"}, latents B x C x T x h x w, one scale per batch."""
        return self.training_loader(self.crops, len(self.crops), [1.0] * len(self.scales), self.passes)

    def _whole(self, split: str, limit: int | None) -> DataLoader[Any]:
        return self.evaluation_loader(WholeLatentPairs(self.store, self.pairs[split], self.scales, limit))

    def val_dataloader(self) -> DataLoader[Any]:
        """Whole clips at every scale, with "video" beside the latents."""
        return self._whole("val", self.val_limit)

    def test_dataloader(self) -> DataLoader[Any]:
        """Whole test clips at every scale, with "video" beside the latents."""
        return self._whole("test", self.test_limit)
