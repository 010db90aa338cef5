"""Pairs of latents of one clip at two resolutions, for training the VLUer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from luve_lightning.data.clip_windows import PairEntry, read_frames
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.latent_store import LatentRecipe, LatentStore
from luve_lightning.data.video_index import Limits, Split, VideoIndex
from luve_lightning.datamodules.base import ResumableDataModule, check_clip_limits, open_index, vae_fingerprint
from luve_lightning.datamodules.buckets import Bucket, LengthChoice, SizeChoice, find_bucketed_pairs, tell_lookup
from luve_lightning.datamodules.latent_crops import CropRule, LatentPairCrops, aligned_windows, in_single
from luve_lightning.datamodules.sampling import SampleKey
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.functional.pixels import fit_frames


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
        frames = read_frames(pair.entry, pair.hr_key)
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
    batch has one scale and comes from one bucket.

    Args:
        index: UltraVideo's CSV, or an index that luve index made.
        store: folder of latents.
        backbone: backbone folder or hub id whose VAE made them.
        size: height and width of the high-resolution pixels, several of them, or an area, as given to precompute.
        scales: high over low resolution, each > 1.
        frames: frames of each encoded window, 4k + 1, or several such lengths.
        windows: windows per training clip; validation and test take the first.
        stride: every stride-th frame.
        fps: the frame rate at which precompute read the clips; None where it took their frames as they are.
        crop: latent frames, height and width of a training crop; cut to what the clips have.
        crop_at: resolution at which `crop` is counted. "high": crops of all scales show as large a part of the picture;
            "low": the model's input is as large at all scales, and the target `scale` times as large.
        crop_frames: "random" starts a crop at any latent frame, "first" takes the clip's first ones.
        video_crop: latent frames, height and width, at high resolution, of a window in each crop whose own pixels come
            with it, as the target of the losses in pixel space; it begins with the clip, so `crop_frames` is "first"
            and `variants` are plain. Costs the decoding of whole frames for each sample. None: VLUerTask
            decodes the target's latents.
        val_limit: at most this many validation clips at each scale.
        test_limit: at most this many test clips at each scale.
        variants: stored versions of the clips to train on, as precompute names them; validation and test use plain
            ones.
        passes: visits of each training window per epoch.
        fill_batches: see CaptionLatentsDataModule.
        stills_share: see CaptionLatentsDataModule.
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
        size: SizeChoice,
        scales: list[float],
        frames: LengthChoice,
        windows: int = 1,
        stride: int = 1,
        fps: float | None = None,
        crop: tuple[int, int, int] = (11, 60, 60),
        crop_at: Literal["high", "low"] = "high",
        crop_frames: Literal["random", "first"] = "random",
        video_crop: tuple[int, int, int] | None = None,
        val_limit: int | None = None,
        test_limit: int | None = None,
        variants: tuple[str, ...] = ("plain",),
        passes: int = 1,
        fill_batches: bool = False,
        stills_share: float | None = None,
        preload: bool = False,
        keep: Limits = Limits(),  # noqa: B008  # frozen
        batch_size: int = 2,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if not scales:
            raise ValueError("scales: expected at least one")
        self.crop = CropRule((crop[0], crop[1], crop[2]), crop_at, crop_frames)
        for scale in scales:
            self.crop.check(scale)
        if video_crop is not None:
            _check_video_crop(video_crop, crop_frames, variants)
        self.video_crop = video_crop
        self.keep = keep
        self.index_path, self.store, self.backbone = Path(index), LatentStore(store), backbone
        self.choose_buckets(size, frames, backbone, fill_batches, stills_share)
        self.scales = list(scales)
        self.windows, self.stride, self.fps = windows, stride, fps
        check_clip_limits(val_limit=val_limit, test_limit=test_limit)
        self.val_limit, self.test_limit = val_limit, test_limit
        self.variants = tuple(variants)
        self.passes, self.preload = passes, preload
        self.pairs: dict[str, list[PairEntry]] = {}

    def _find(self, index: VideoIndex, split: Split, fingerprint: str) -> list[PairEntry]:
        variants = self.variants if split == "train" else ("plain",)
        recipe = LatentRecipe(
            vae=fingerprint,
            size=self.buckets.sizes[0],
            scales=tuple(self.scales),
            frames=self.buckets.lengths[0],
            windows=self.windows if split == "train" else 1,
            stride=self.stride,
            fps=self.fps,
            variants=variants,
        )
        hashes, entries = ClipHashes(self.store.root), self.clips_of(index, split)
        pairs: list[PairEntry] = []
        buckets: list[Bucket] = []
        for variant in variants:
            found = find_bucketed_pairs(self.store, hashes, entries, recipe, self.buckets, variant)
            tell_lookup(split, found.lookup)
            pairs += found.pairs
            buckets += found.buckets
        self.note_buckets(split, buckets)
        return pairs

    def open_splits(self, *splits: Split) -> None:
        """Look up every latent; for a missing one, raise an error that says how to make it."""
        missing = self.unopened(splits, self.pairs)
        if not missing:
            return
        index = open_index(self.index_path, self.keep)
        fingerprint = vae_fingerprint(self.backbone, self.store.root)

        def find(split: Split) -> None:
            self.pairs[split] = self._find(index, split, fingerprint)

        self.look_up(index, missing, find)
        if "train" in missing:
            train = self.pairs["train"]
            self.crops = LatentPairCrops(
                self.store, train, self.scales, self.crop, self.preload, self.video_crop, self.bucket_numbers("train")
            )
            self._tell_cut_crops()

    def _firsts(self, split: str) -> list[tuple[str, PairEntry]]:
        """The first pair of each bucket of a split, whose sizes all have, with words for a message."""
        pairs, buckets = self.pairs[split], self.buckets_of(split)
        if buckets is None:
            return [("", pairs[0])]
        return [(f" in bucket {bucket}", pairs[buckets.index(bucket)]) for bucket in self.buckets if bucket in buckets]

    def _tell_cut_crops(self) -> None:
        """Say at which scales the clips are smaller than the crop that was asked for."""
        for where, pair in self._firsts("train"):
            shape = self.crops.shape(pair)
            for scale in self.scales:
                wanted = self.crop.high(scale)
                if any(n < want for n, want in zip(shape, wanted, strict=True)):
                    cut = [min(n, want) for n, want in zip(shape, wanted, strict=True)]
                    at = f"{scale:g}x{where}"
                    rank_zero_info(
                        f"crops at {at}: {_sides(cut)} high-resolution latents of {_sides(wanted)} asked for"
                    )

    def grids(self, split: Split) -> list[tuple[Size3d, Size3d]]:
        """Sizes of low- and high-resolution latents that a split brings, one pair for each bucket and scale.

        Crops for training, whole clips otherwise.
        """
        found = []
        for _, pair in self._firsts(split):
            for scale in self.scales:
                low, high = ((n[1], n[2], n[3]) for n in map(self.store.shape, (pair.lr_keys[scale], pair.hr_key)))
                if split == "train":
                    windows = aligned_windows(high, self.crop, scale, np.random.default_rng(0))
                    high, low = ((t[1] - t[0], y[1] - y[0], x[1] - x[0]) for t, y, x in windows)
                found.append((low, high))
        return found

    def low_crops(self, count: int, seed: int) -> Iterator[tuple[Tensor, Size3d]]:
        """Some training crops at each scale, for statistics taken before training; the same ones for one seed.

        Args:
            count: crops at each scale, at most; no clip twice.
            seed: decides which, and where they lie.

        Yields:
            One crop's low-resolution latents, 1 x C x T x h x w, and the size of its high-resolution ones.
        """
        order = np.random.default_rng([seed, len(self.crops)]).permutation(len(self.crops))[:count].tolist()
        for kind in range(len(self.scales)):
            for number, index in enumerate(order):
                item = self.crops[SampleKey(index, kind, (seed, 0, number))]
                _, t, y, x = item["hr"].shape
                yield item["lr"][None], (t, y, x)

    def clip_counts(self) -> dict[str, int]:
        """Clips of each split; see ResumableDataModule."""
        limits = {"val": self.val_limit, "test": self.test_limit}
        clips = {split: len({pair.entry.clip_id for pair in pairs}) for split, pairs in self.pairs.items()}
        return {split: min(count, limits.get(split) or count) for split, count in clips.items()}

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of {"hr", "lr", "scale", "clip_id"}, latents B x C x T x h x w as stored, one scale per batch.

        With `video_crop` also "video", B x 3 x T x H x W in [-1, 1], and "window", where in "hr" that is: integers
        B x 3 x 2, (start, stop) of latent frames, rows and columns. With several buckets also "bucket", its number.
        """
        weights = [1.0] * len(self.scales)
        # The smallest scale has the largest input for high-resolution crops of one size; else the largest has more.
        largest = (max if self.crop.at == "low" else min)(self.scales)
        return self.training_loader(
            self.crops, len(self.crops), weights, self.passes, self._volume, self.scales.index(largest)
        )

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """On the device: latents become float32."""
        return in_single(batch)

    def _volume(self, item: int) -> int:
        """High-resolution latents of an item's largest crop."""
        shape = self.crops.shape(self.crops.pairs[item])
        return max(math.prod(map(min, shape, self.crop.high(scale))) for scale in self.scales)

    def _whole(self, split: str, limit: int | None) -> DataLoader[Any]:
        return self.evaluation_loader(WholeLatentPairs(self.store, self.pairs[split], self.scales, limit))

    def val_dataloader(self) -> DataLoader[Any]:
        """Whole clips at every scale, with "video" beside the latents."""
        return self._whole("val", self.val_limit)

    def test_dataloader(self) -> DataLoader[Any]:
        """Whole test clips at every scale, with "video" beside the latents."""
        return self._whole("test", self.test_limit)


def _check_video_crop(video_crop: Size3d, crop_frames: str, variants: Sequence[str]) -> None:
    if min(video_crop) < 1:
        raise ValueError(f"video_crop: expected three extents >= 1, got {tuple(video_crop)}")
    if crop_frames != "first":
        raise ValueError(
            f"video_crop: expected crop_frames: first, got {crop_frames}: without a clip's first latents, later ones "
            "decode to other frames"
        )
    if tuple(variants) != ("plain",):
        raise ValueError(f"video_crop: expected variants: [plain], whose pixels are the clip's, got {list(variants)}")


def _sides(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
