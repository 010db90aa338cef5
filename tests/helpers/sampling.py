"""Training runs with sample videos: small metrics, sources that get in the way, and runs in processes of their own."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from luve_lightning.callbacks import Export, RandomState, SampleMetrics
from luve_lightning.datamodules import LatentPairsDataModule
from luve_lightning.evaluation.sample_sources import GeneratedVideos, Samples, SampleVideo, UpsampledVideos
from luve_lightning.functional.patches import PatchPlan
from luve_lightning.losses import LatentL1
from luve_lightning.metrics.base import Unavailable, VideoMetric
from luve_lightning.metrics.feature_moments import FeatureExtractor
from luve_lightning.metrics.frechet_patch import FrechetPatchDistance
from luve_lightning.tasks import VLUerTask
from tests.helpers.resumable import Run, train
from tests.helpers.tiny_flow import FRAMES, SIZE, World, make_trainer
from tests.helpers.upsampling import tiny_vluer


class Brightness(VideoMetric):
    name, resolution = "brightness", "native"

    def measure(self, frames: Tensor, reference: Tensor | None) -> float:
        return float(frames.double().mean()) / 255


class Error(VideoMetric):
    """Mean absolute difference from the original."""

    name, resolution, full_reference = "error", "native", True

    def measure(self, frames: Tensor, reference: Tensor | None) -> float:
        assert reference is not None
        return float((frames.double() - reference.double()).abs().mean())


class Meddler(Brightness):
    """Does what libraries of metrics do: draws from every generator and changes torch's settings."""

    def measure(self, frames: Tensor, reference: Tensor | None) -> float:
        torch.manual_seed(11)
        np.random.seed(11)  # noqa: NPY002
        random.seed(11)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.deterministic = True
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True, warn_only=True)
        return super().measure(frames, reference)


class Missing(Brightness):
    """A metric whose network is not here."""

    def load(self) -> None:
        raise Unavailable("network.pt (1 MB) is not in ~/.cache")


class Colours(FeatureExtractor):
    """Mean and spread of each channel."""

    kind, resolution, name, dim = "colours", "native", "colours-1", 6

    def forward(self, patches: Tensor) -> Tensor:
        flat = patches.float().flatten(2)
        return torch.cat([flat.mean(2), flat.std(2)], dim=1)


def colour_distance() -> FrechetPatchDistance:
    return FrechetPatchDistance(extractor=Colours(), patches=PatchPlan(size=16, frames=2))


class Meddling(UpsampledVideos):
    """Leaves the task in another mode, trainable where it was frozen and the other way round."""

    @contextmanager
    def open(self, task: Any, datamodule: Any, precision: Any) -> Iterator[Samples]:
        with super().open(task, datamodule, precision) as samples:

            def make(index: int) -> SampleVideo:
                assert not any(module.training for module in task.modules())
                assert not torch.is_grad_enabled()
                made = samples.make(index)
                task.train()
                for parameter in task.parameters():
                    parameter.requires_grad_(not parameter.requires_grad)
                made_again = samples.make(index)
                assert torch.equal(made.frames, made_again.frames)
                task.eval()
                for parameter in task.parameters():
                    parameter.requires_grad_(False)
                torch.randn(3)
                return made

            yield replace(samples, make=make)


class FailingOnOne(UpsampledVideos):
    """Its second video cannot be made."""

    @contextmanager
    def open(self, task: Any, datamodule: Any, precision: Any) -> Iterator[Samples]:
        with super().open(task, datamodule, precision) as samples:

            def make(index: int) -> SampleVideo:
                if index == 1:
                    raise OSError("disk on fire")
                return samples.make(index)

            yield replace(samples, make=make)


class SlowOnOne(UpsampledVideos):
    """Its second video takes two seconds."""

    @contextmanager
    def open(self, task: Any, datamodule: Any, precision: Any) -> Iterator[Samples]:
        with super().open(task, datamodule, precision) as samples:

            def make(index: int) -> SampleVideo:
                time.sleep(2.0 * (index == 1))
                return samples.make(index)

            yield replace(samples, make=make)


class NoisyVLUerTask(VLUerTask):
    """A VLUer whose steps draw from every global generator."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        noise = torch.randn(()) + float(np.random.standard_normal()) + random.gauss(0.0, 1.0)  # noqa: NPY002
        return super().training_step(batch | {"lr": batch["lr"] + 0.01 * noise}, batch_idx)


def pairs(world: World) -> LatentPairsDataModule:
    """Trains on one clip, has four held out."""
    return LatentPairsDataModule(
        world.clips / "clips.csv", world.latents, str(world.backbone), SIZE, [2.0], FRAMES,
        crop=(3, 6, 6), passes=24, batch_size=1,
    )  # fmt: skip


def vluer_task(world: World, **changes: Any) -> VLUerTask:
    return NoisyVLUerTask(tiny_vluer(), str(world.backbone), {"latent": LatentL1()}, **({"lr": 1e-3} | changes))


def sampler(folder: Path, **changes: Any) -> SampleMetrics:
    options: dict[str, Any] = {
        "source": UpsampledVideos(2.0, clips=3),
        "metrics": {"brightness": Brightness(), "error": Error(), "fd_patch_colours": colour_distance()},
        "every_n_steps": 2,
    }
    return SampleMetrics(**(options | {"output": folder / "samples"} | changes))


# What processes of their own run; `run.task` holds the world, the task's arguments and the callback's.


def train_vluer(run: Run) -> None:
    """A resumable run of a VLUer, with sample metrics when run.task has "samples"."""
    world: World = run.task["world"]
    options = run.task.get("samples")
    callbacks = () if options is None else (sampler(run.folder, **options),)
    train(run.with_(callbacks=callbacks), vluer_task(world, **run.task.get("task", {})), pairs(world))


def adapt_sharded(run: Run) -> None:
    """Adaptation of sharded weights (FSDP2), with generated samples when run.task has "samples"."""
    torch.set_num_threads(1)
    world: World = run.task["world"]
    torch.manual_seed(0)
    source = GeneratedVideos(32, 32, 5, clips=3, steps=2, guidance=2.0)
    callbacks: list[Any] = [RandomState()]
    if run.task.get("samples"):
        callbacks.append(sampler(run.folder, source=source, metrics={"brightness": Brightness()}))
    trainer = make_trainer(
        run.folder,
        devices=run.processes,
        strategy=ModelParallelStrategy(run.processes, 1, save_distributed_checkpoint=False),
        max_steps=run.steps,
        callbacks=[*callbacks, Export(run.folder)],
    )
    trainer.fit(world.adaptation(lr=1e-3), world.data(batch_size=1, passes=12))
