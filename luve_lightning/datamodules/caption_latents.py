"""Latents of clips with their captions, for training diffusion."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from luve_lightning.data.clip_scores import ClipScores
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.latent_store import HIGH_RESOLUTION, LatentKey, LatentRecipe, LatentStore
from luve_lightning.data.text_store import StoredEmbeddings, TextStore
from luve_lightning.data.video_index import ClipEntry, Limits, Split
from luve_lightning.datamodules.base import ResumableDataModule, check_clip_limits, open_index, vae_fingerprint
from luve_lightning.datamodules.buckets import (
    Bucket,
    BucketedPairs,
    LengthChoice,
    SizeChoice,
    find_bucketed_pairs,
    tell_lookup,
)

Embed = Callable[[str], Tensor]
"""From a caption to its embedding, L x D."""


class CaptionLatents(Dataset[dict[str, Any]]):
    """Whole latents, each with a caption, addressed by index or, with randomness, by `SampleKey`.

    Args:
        store: the latents.
        items: clip and key of its latents, one per item.
        columns: caption columns; a sample takes one at random, an index the first. None at all: every caption is
            empty.
        drop: probability that a sample's caption is empty, for classifier-free guidance.
        embed: looks embeddings up; None leaves captions as text.
        preload: keep all latents in memory.
        numbers: number of each item's bucket, which a sample then brings; None where all have one size.
        lows: key of each item's low-resolution latents, which a sample then brings; None where there are none.
    """

    def __init__(
        self,
        store: LatentStore,
        items: Sequence[tuple[ClipEntry, LatentKey]],
        columns: Sequence[str],
        drop: float = 0.0,
        embed: Embed | None = None,
        preload: bool = False,
        numbers: Sequence[int] | None = None,
        lows: Sequence[LatentKey] | None = None,
    ) -> None:
        if not 0 <= drop <= 1:
            raise ValueError(f"drop: expected a chance in [0, 1], got {drop}")
        self.store, self.items, self.columns = store, list(items), list(columns)
        self.drop, self.embed = drop, embed
        self.numbers = None if numbers is None else list(numbers)
        for entry, _ in self.items:
            missing = [column for column in self.columns if column not in entry.captions]
            if missing:
                raise ValueError(f"columns: {missing[0]!r} is no caption column; known: {', '.join(entry.captions)}")
        self.lows = None if lows is None else list(lows)
        keys = dict.fromkeys([*(key for _, key in self.items), *(self.lows or ())]) if preload else ()
        self.loaded = {key: store.read(key) for key in keys}

    def __len__(self) -> int:
        return len(self.items)

    def _caption(self, index: int, key: Any) -> str:
        entry, _ = self.items[index]
        if not self.columns:
            return ""
        if isinstance(key, int):
            return entry.captions[self.columns[0]]
        rng = np.random.default_rng(list(key.seed))
        # Always draw both, so that one setting does not change the other's draws.
        dropped, column = rng.random() < self.drop, self.columns[int(rng.integers(len(self.columns)))]
        return "" if dropped else entry.captions[column]

    def _latents(self, key: LatentKey) -> Tensor:
        return self.loaded[key] if key in self.loaded else self.store.read(key)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        index = key if isinstance(key, int) else key.index
        entry, latent_key = self.items[index]
        latents = self._latents(latent_key)
        caption = self._caption(index, key)
        # Clips have several windows; what is fixed by name is fixed for each.
        item: dict[str, Any] = {"latents": latents, "clip_id": f"{entry.clip_id}@{latent_key.frames[0]}"}
        if self.numbers is not None:
            item["bucket"] = torch.tensor(self.numbers[index])
        if self.lows is not None:
            item["low"] = self._latents(self.lows[index])
        return item | ({"caption": caption} if self.embed is None else {"text": self.embed(caption)})


@dataclass(frozen=True)
class CaptionItem:
    """A window of a clip that a sample is made of.

    Attributes:
        entry: the clip.
        key: key of its latents.
        bucket: their bucket.
        low: key of the low-resolution latents that come with them, if any do.
    """

    entry: ClipEntry
    key: LatentKey
    bucket: Bucket
    low: LatentKey | None = None


@dataclass(frozen=True)
class Selection:
    """A rule that keeps the training clips above a threshold.

    Attributes:
        scores: what `luve score` wrote.
        scorer: measure that the threshold is meant for; scores by another are refused.
        threshold: threshold on that measure's scale; LuVe keeps clips with HPS v3 > 6.5.
    """

    scores: Path
    scorer: str
    threshold: float


class CaptionLatentsDataModule(ResumableDataModule):
    """Whole latents with their captions, as text or as stored embeddings; a batch comes from one bucket.

    Reads what `luve precompute` wrote with the same index, store, backbone, size, scales and frames.

    Args:
        index: UltraVideo's CSV, or an index that luve index made.
        store: folder of latents.
        backbone: backbone folder or hub id whose VAE made them.
        size: height and width of the high-resolution pixels, several of them, or an area, as given to precompute.
        frames: frames of each encoded window, 4k + 1, or several such lengths.
        scale: which of the stored sizes; 1 is the high resolution, 2 half of it.
        low_scale: also bring the latents of the same windows at this scale, larger than `scale`; None brings none.
        low_variant: stored version of the clips from which the low-resolution latents are, such as a degraded one;
            None takes them from the same version as the others.
        windows: windows per training clip; validation takes the first.
        stride: every stride-th frame.
        fps: the frame rate at which precompute read the clips; None where it took their frames as they are.
        variant: stored version of the clips, as precompute names it.
        uncaptioned: further versions, which training sees with the empty caption, all together as often as
            `variant`. The captions no longer describe them (mirrored, other colours), but they keep a model of few
            clips from memorising these.
        texts: store of caption embeddings, written by `luve embed`; None gives captions as text.
        text_encoder: beginning of the encoder's fingerprint, to choose among several kinds of embeddings in the
            store.
        selection: keeps the training clips above a threshold; None keeps all. Held-out clips are never selected.
        val_limit: at most this many validation clips.
        test_limit: at most this many test clips.
        columns: caption columns; each training sample takes one at random, validation the first. With none ([])
            every sample, held-out ones too, has the empty caption.
        drop_caption: probability that a training sample's caption is empty.
        passes: visits of each training window per epoch.
        fill_batches: `batch_size` counts samples of the largest bucket, and smaller buckets take as many as hold no
            more latents.
        stills_share: share of the training samples from buckets of one frame; None takes them as they come. 0 trains on
            clips alone, 1 on stills alone.
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
        frames: LengthChoice,
        scale: float = HIGH_RESOLUTION,
        low_scale: float | None = None,
        low_variant: str | None = None,
        windows: int = 1,
        stride: int = 1,
        fps: float | None = None,
        variant: str = "plain",
        uncaptioned: tuple[str, ...] = (),
        texts: Path | None = None,
        text_encoder: str | None = None,
        selection: Selection | None = None,
        val_limit: int | None = None,
        test_limit: int | None = None,
        columns: tuple[str, ...] = ("Summarized Description",),
        drop_caption: float = 0.1,
        passes: int = 1,
        fill_batches: bool = False,
        stills_share: float | None = None,
        preload: bool = False,
        keep: Limits = Limits(),  # noqa: B008  # frozen
        batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.keep = keep
        self.index_path, self.store, self.backbone = Path(index), LatentStore(store), backbone
        self.choose_buckets(size, frames, backbone, fill_batches, stills_share)
        self.scale = float(scale)
        if low_scale is not None and not low_scale > self.scale:
            raise ValueError(f"low_scale: expected a scale above {self.scale:g}, the scale, got {low_scale:g}")
        if low_variant is not None and low_scale is None:
            raise ValueError("low_variant: expected low_scale, too: without it no low-resolution latents are read")
        self.low_scale, self.low_variant = low_scale, low_variant
        self.windows, self.stride, self.fps, self.variant = windows, stride, fps, variant
        self.uncaptioned = tuple(uncaptioned)
        self.texts, self.text_encoder, self.selection = texts, text_encoder, selection
        self.limits = {"val": val_limit, "test": test_limit}
        check_clip_limits(val_limit=val_limit, test_limit=test_limit)
        self.columns, self.drop_caption = tuple(columns), drop_caption
        self.passes, self.preload = passes, preload
        self.datasets: dict[str, CaptionLatents] = {}

    def _pairs(self, entries: list[ClipEntry], split: Split, variant: str, fingerprint: str) -> BucketedPairs:
        wanted = (self.scale, *(() if self.low_scale is None else (self.low_scale,)))
        recipe = LatentRecipe(
            vae=fingerprint,
            size=self.buckets.sizes[0],
            scales=tuple(scale for scale in wanted if scale != HIGH_RESOLUTION),
            frames=self.buckets.lengths[0],
            windows=self.windows if split == "train" else 1,
            stride=self.stride,
            fps=self.fps,
            variants=(variant,),
        )
        found = find_bucketed_pairs(self.store, ClipHashes(self.store.root), entries, recipe, self.buckets, variant)
        tell_lookup(split, found.lookup)
        return found

    def _items(
        self, entries: list[ClipEntry], split: Split, variant: str, fingerprint: str, low_variant: str | None = None
    ) -> list[CaptionItem]:
        found = self._pairs(entries, split, variant, fingerprint)
        items = [
            CaptionItem(pair.entry, pair.hr_key if self.scale == HIGH_RESOLUTION else pair.lr_keys[self.scale], bucket)
            for pair, bucket in zip(found.pairs, found.buckets, strict=True)
        ]
        if self.low_scale is None:
            return items
        others = found if low_variant is None else self._pairs(entries, split, low_variant, fingerprint)
        lows = {(pair.entry.clip_id, pair.hr_key.frames): pair.lr_keys[self.low_scale] for pair in others.pairs}
        return [replace(item, low=lows[item.entry.clip_id, item.key.frames]) for item in items]

    def _training_items(self, entries: list[ClipEntry], fingerprint: str) -> list[CaptionItem]:
        """The items of `variant`, repeated as often as there are uncaptioned ones, then those."""
        captioned = self._items(entries, "train", self.variant, fingerprint, self.low_variant)
        items = captioned * max(1, len(self.uncaptioned))
        silent = [replace(entry, captions=dict.fromkeys(entry.captions, "")) for entry in entries]
        for variant in self.uncaptioned:
            items += self._items(silent, "train", variant, fingerprint)
        return items

    def _check_captions(self, embed: StoredEmbeddings, dataset: CaptionLatents) -> None:
        """Refuse to start when an embedding is missing; it would end the run when its turn comes."""
        captions = {entry.captions[column] for entry, _ in dataset.items for column in self.columns}
        captions |= {""} if dataset.drop or not self.columns else set()
        for caption in sorted(captions):
            if not embed.store.has(embed.source.key(caption)):
                embed(caption)  # its error says what is missing and how to make it

    def _selected(self, entries: list[ClipEntry]) -> list[ClipEntry]:
        if self.selection is None:
            return entries
        scores = ClipScores.read(self.selection.scores)
        # The latents' hashes: saves reading the clips once more for the scores'.
        hashes = ClipHashes(self.store.root)
        kept, summary = scores.keep(entries, self.selection.threshold, self.selection.scorer, hashes)
        rank_zero_info(f"training clips: {summary}")
        return kept

    def open_splits(self, *splits: Split) -> None:
        """Look up every latent and embedding; for a missing one, raise an error that says how to make it."""
        missing = self.unopened(splits, self.datasets)
        if not missing:
            return
        index = open_index(self.index_path, self.keep)
        fingerprint = vae_fingerprint(self.backbone, self.store.root)
        store = None if self.texts is None else TextStore(self.texts)
        embed = None if store is None else StoredEmbeddings(store, store.source(self.text_encoder))

        def find(split: Split) -> None:
            train, entries = split == "train", self.clips_of(index, split)
            if train:
                items = self._training_items(self._selected(entries), fingerprint)
            else:
                items = self._items(entries, split, self.variant, fingerprint, self.low_variant)
            items = items[: self.limits.get(split)]
            self.note_buckets(split, [item.bucket for item in items])
            dataset = self.datasets[split] = CaptionLatents(
                self.store,
                [(item.entry, item.key) for item in items],
                self.columns,
                self.drop_caption if train else 0.0,
                embed,
                preload=self.preload and train,
                numbers=self.bucket_numbers(split),
                lows=None if self.low_scale is None else [item.low for item in items if item.low is not None],
            )
            if embed is not None:
                self._check_captions(embed, dataset)

        self.look_up(index, missing, find)

    def clip_counts(self) -> dict[str, int]:
        """Clips of each split; see ResumableDataModule."""
        items = {split: dataset.items for split, dataset in self.datasets.items()}
        return {split: len({entry.clip_id for entry, _ in some}) for split, some in items.items()}

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of {"latents": B x C x t x h x w, "caption" or "text", "clip_id"}.

        With several buckets also "bucket", its number; with `low_scale` also "low", the low-resolution latents.
        """
        dataset = self.datasets["train"]
        return self.training_loader(dataset, len(dataset), passes=self.passes, volume_of=self._volume)

    def _volume(self, item: int) -> int:
        """Latents of a training item, frames x height x width."""
        return math.prod(self.store.shape(self.datasets["train"].items[item][1])[1:])

    def val_dataloader(self) -> DataLoader[Any]:
        """Held-out clips in the index's order; with several buckets, in that of the buckets."""
        return self.evaluation_loader(self.datasets["val"], self.batch_size, self.buckets_of("val"))

    def test_dataloader(self) -> DataLoader[Any]:
        """Test clips in the same order."""
        return self.evaluation_loader(self.datasets["test"], self.batch_size, self.buckets_of("test"))
