"""Pairs of latents at two resolutions, for training and comparing upsamplers."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from luve_lightning.data.clip_hashes import ClipHashes
from luve_lightning.data.fingerprints import vae_fingerprint
from luve_lightning.data.latent_pairs import LatentPairCrops, PairEntry, WholeLatentPairs, find_pair_keys
from luve_lightning.data.latent_recipe import LatentRecipe
from luve_lightning.data.latent_store import LatentStore
from luve_lightning.data.video_index import Limits, Split, VideoIndex
from luve_lightning.datamodules.base import ResumableDataModule, check_clip_limits, open_index, tell_lookup


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
                raise ValueError(
                    f"crop: height and width must be multiples of {unit} for scale {scale:g}, got {crop}"
                )
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
            self.crops = LatentPairCrops(
                self.store, self.pairs["train"], self.scales, self.crop, self.preload
            )

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
