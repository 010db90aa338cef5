"""Training runs over several buckets, in this process or in some of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from luve_lightning.datamodules import CaptionLatentsDataModule, LatentPairsDataModule
from luve_lightning.losses import FrameDifferenceL1, LatentL1, PixelL1
from luve_lightning.models.vluer import VLUer
from luve_lightning.tasks import AdaptationTask, VLUerTask
from tests.helpers.bucket_world import LENGTHS, SIZES
from tests.helpers.resumable import Run, train


def captions(world: Path, backbone: Path, **changes: Any) -> CaptionLatentsDataModule:
    """Latents of the clips of `write_shapes`, in five buckets, with their captions' embeddings."""
    options: dict[str, Any] = {"size": SIZES, "frames": LENGTHS, "texts": world / "texts", "batch_size": 2} | changes
    return CaptionLatentsDataModule(world / "clips.csv", world / "store", str(backbone), **options)


def pairs(world: Path, backbone: Path, **changes: Any) -> LatentPairsDataModule:
    """Pairs of latents of the same clips at two scales."""
    options: dict[str, Any] = {"size": SIZES, "frames": LENGTHS, "scales": [2.0], "crop": (2, 4, 4), "batch_size": 2}
    return LatentPairsDataModule(world / "clips.csv", world / "store", str(backbone), **(options | changes))


class SeenShapes(L.Callback):
    """The shape of each training batch and what was logged of its bucket."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.buckets: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        latents: Tensor = batch["latents"] if "latents" in batch else batch["hr"]
        self.shapes.append(tuple(latents.shape))
        self.buckets.append(float(trainer.callback_metrics["train/bucket"]))


def adaptation(backbone: Path) -> AdaptationTask:
    return AdaptationTask(str(backbone), lr=1e-3)


def upsampler(backbone: Path) -> VLUerTask:
    """A tiny VLUer with losses in pixel space."""
    net = VLUer(latent_channels=16, channels=16, pairs=1, hidden=16, query_channels=16, decoder_layers=1)
    losses: dict[str, Any] = {"latent": LatentL1(1.0), "pixel": PixelL1(1.0), "frames": FrameDifferenceL1(1.0)}
    return VLUerTask(net, str(backbone), losses, pixel_from_step=3, pixel_crop=(2, 2, 2))


def train_adaptation(run: Run) -> L.Trainer:
    """Adapt the tiny transformer on five buckets; `run.task` has `world`, `backbone` and options of the data."""
    return train(run, adaptation(run.task["backbone"]), captions(**run.task))


def train_vluer(run: Run) -> L.Trainer:
    """Train the tiny VLUer on five buckets, likewise."""
    torch.manual_seed(0)  # the same weights to begin with, in each run that is compared
    return train(run, upsampler(run.task["backbone"]), pairs(**run.task))
