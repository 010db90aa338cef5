"""Encoding clips into the latent store: the predict-only task behind `luve precompute`."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import astuple, dataclass

import lightning as L
import torch
from torch import Tensor, nn

from luve_lightning.data.clip_container import ClipError
from luve_lightning.data.clip_windows import EncodeItem, WindowReader
from luve_lightning.data.latent_store import HIGH_RESOLUTION, LatentKey
from luve_lightning.data.quarantine import Quarantine, TooManyBadClips
from luve_lightning.data.variants import PixelTransform, variant_name
from luve_lightning.functional.pixels import resize_frames, resize_video
from luve_lightning.models.backbones import LatentSpace

LatentKeys = dict[tuple[str, float], LatentKey]


@dataclass
class EncodeTotals:
    """Counts of a run.

    Attributes:
        encoded: number of entries written.
        bytes: written.
        bad: number of windows whose clip could not be used.
    """

    encoded: int = 0
    bytes: int = 0
    bad: int = 0

    def __add__(self, other: EncodeTotals) -> EncodeTotals:
        return EncodeTotals(self.encoded + other.encoded, self.bytes + other.bytes, self.bad + other.bad)


class EncodeTask(L.LightningModule):
    """Encodes batches of windows at every scale and variant, and writes what is missing.

    An entry's numbers depend neither on the clips that shared its batch nor on the store's content: the VAE always
    sees `batch_size` clips (a short batch is filled up), because convolutions round differently for other batch
    sizes.

    Args:
        codec: the VAE.
        read: decodes a window; knows the recipe and the store.
        transforms: transform of the high-resolution pixels for each of the recipe's variants.
        quarantine: records bad clips.
        batch_size: windows per batch.
    """

    def __init__(
        self,
        codec: LatentSpace,
        read: WindowReader,
        transforms: Mapping[str, PixelTransform],
        quarantine: Quarantine,
        batch_size: int,
    ) -> None:
        super().__init__()
        self.codec = codec
        self.transforms = nn.ModuleList(transforms.values())
        self.variants = [variant_name(name, transform) for name, transform in transforms.items()]
        self.read, self.recipe, self.store = read, read.recipe, read.store
        self.quarantine, self.batch_size = quarantine, batch_size
        self.deferred: list[EncodeItem] = []
        self.totals = EncodeTotals()
        self.seconds_written = 0.0  # in which all was encoded, and not yet stored

    def predict_step(self, batch: list[EncodeItem], batch_idx: int) -> int:
        """Claim, encode and write the missing latents of a batch; those that others claimed wait until the end.

        Returns:
            Number of entries written.
        """
        before = self.totals.encoded
        with ExitStack() as claims:
            ready = []
            for item in batch:
                if item.error is not None:
                    self._set_aside(item)
                    continue
                mine, others = self._claim(item, claims)
                if others:
                    self.deferred.append(EncodeItem(item.window, others))
                if mine:
                    ready.append(EncodeItem(item.window, mine, item.frames))
            if ready:
                self._encode(ready)
        return self.totals.encoded - before

    def on_predict_epoch_end(self) -> None:
        """Wait for other processes' entries, make those they gave up, and sum the counts of all processes."""
        for item in self.deferred:
            self._finish(item)
        self.deferred = []
        counts = torch.tensor(astuple(self.totals), dtype=torch.int64, device=self.device)
        self.totals = EncodeTotals(*map(int, self.trainer.strategy.reduce(counts, reduce_op="sum").tolist()))

    def _claim(self, item: EncodeItem, claims: ExitStack) -> tuple[LatentKeys, LatentKeys]:
        """The item's keys that are ours to make now, and those that another process is making."""
        mine, others = {}, {}
        for name, key in item.missing.items():
            if claims.enter_context(self.store.claim(key)):
                mine[name] = key
            elif not self.store.has(key):
                others[name] = key
        return mine, others

    def _finish(self, item: EncodeItem) -> None:
        with ExitStack() as claims:
            # The same order in all processes, so that they never wait for each other in a circle.
            in_order = sorted(item.missing.items(), key=lambda named: named[1].digest)
            mine = {name: key for name, key in in_order if claims.enter_context(self.store.claim(key, wait=True))}
            if not mine:
                return
            again = self.read(item.window)
            if again.error is not None:
                self._set_aside(again)
                return
            again.missing = {name: key for name, key in again.missing.items() if mine.get(name) == key}
            if again.missing:
                self._encode([again])

    def _set_aside(self, item: EncodeItem) -> None:
        assert item.error is not None
        self.totals.bad += 1
        self.quarantine.add(ClipError(item.window.clip.path, item.error))

    def _encode(self, items: list[EncodeItem]) -> None:
        frames = [item.frames.to(self.device) for item in items if item.frames is not None]
        videos = torch.stack([resize_frames(clip, self.recipe.size) for clip in frames])
        del frames
        written: list[Future[int]] = []
        # One size is written while the next one is encoded.
        with ThreadPoolExecutor(1) as writer:
            for variant, transform in zip(self.variants, self.transforms, strict=True):
                changed: Tensor | None = None
                for scale in (HIGH_RESOLUTION, *self.recipe.scales):
                    wanted = [i for i, item in enumerate(items) if (variant, scale) in item.missing]
                    if not wanted:
                        continue
                    if changed is None:
                        changed = transform(videos)
                    latents = self._latents(resize_video(changed[wanted], self.recipe.pixel_size(scale)))
                    for i, entry in zip(wanted, latents, strict=True):
                        written.append(writer.submit(self.store.write, items[i].missing[variant, scale], entry))
            encoded = time.perf_counter()
        for future in written:
            self.totals.bytes += future.result()
            self.totals.encoded += 1
        self.seconds_written += time.perf_counter() - encoded

    def _latents(self, pixels: Tensor) -> Tensor:
        count = len(pixels)
        if count < self.batch_size:
            pixels = torch.cat([pixels, pixels[-1:].expand(self.batch_size - count, -1, -1, -1, -1)])
        return self.codec.encode(pixels)[:count].float().cpu()


def predict_latents(runner: L.Trainer, task: EncodeTask, data: L.LightningDataModule) -> None:
    """Run the task; when this process fails, end the processes that it started.

    Raises:
        TooManyBadClips: this process or another stopped for bad clips.
    """
    try:
        with warnings.catch_warnings():
            # Decoding between the encodes is a choice, and so is a run that finds nothing left to do.
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            warnings.filterwarnings("ignore", message="Total length of .* across ranks is zero")
            # Lightning 2.6 still calls PyTorch's pytree as before 2.12.
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            runner.predict(task, datamodule=data, return_predictions=False)
    except BaseException as error:
        launcher = runner.strategy.launcher
        if launcher is not None:
            launcher.kill(signal.SIGTERM)
        if isinstance(error, RuntimeError) and runner.world_size > 1 and task.quarantine.too_many():
            # Another process stopped for bad clips, and this one only lost the connection to it.
            raise TooManyBadClips(task.quarantine.describe()) from None
        raise
