"""Flow matching on the tiny world: data, tasks and short real runs, also in processes of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from luve_lightning.callbacks import AtomicCheckpointIO, Checkpoints, Export, RandomState
from luve_lightning.datamodules import CaptionLatentsDataModule
from luve_lightning.functional.frequency import FrequencyFilter
from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.models.experts import ExpertConfig
from luve_lightning.tasks import AdaptationTask, ExpertTask, FlowMatchingTask
from tests.helpers.resumable import Run, train

LFE = ExpertConfig("attention", 4, 4, FrequencyFilter("low", 0.5), SigmaBand(0.875, 1.0))
SIZE, FRAMES = (48, 48), 9


@dataclass(frozen=True)
class World:
    """Where the tiny backbone, clips, latents and embeddings are."""

    backbone: Path
    clips: Path
    latents: Path
    texts: Path

    def data(self, **changes: Any) -> CaptionLatentsDataModule:
        options: dict[str, Any] = {"texts": self.texts, "batch_size": 2, "passes": 2} | changes
        index = self.clips / "clips.csv"
        return CaptionLatentsDataModule(index, self.latents, str(self.backbone), SIZE, FRAMES, **options)

    def expert(self, expert: ExpertConfig = LFE, **changes: Any) -> ExpertTask:
        return ExpertTask(str(self.backbone), expert, "lfe", **changes)

    def adaptation(self, **changes: Any) -> AdaptationTask:
        return AdaptationTask(str(self.backbone), export_dtype="float32", **changes)

    def resplit(self, folder: Path, **splits: str) -> World:
        """The same clips with those of split `value` in split `key`."""
        folder.mkdir()
        (folder / "clips").symlink_to(self.clips / "clips")
        (folder / "clips.csv").write_text((self.clips / "clips.csv").read_text())
        urls = json.loads((self.clips / "splits.json").read_text())
        new = {key: urls[splits[key]] for key in ("train", "val", "test")}
        (folder / "splits.json").write_text(json.dumps(new))
        return replace(self, clips=folder)


def make_trainer(folder: Path, **changes: Any) -> L.Trainer:
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "use_distributed_sampler": False,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return L.Trainer(**(options | changes))


class Draws(L.Callback):
    """What each call of `losses_of` was given and gave; rank by rank in `draws-<rank>.json` when the run ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[dict[str, Any]] = []

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        losses_of = pl_module.losses_of

        def recorded(latents: Tensor, text: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
            losses: Tensor = losses_of(latents, text, sigma, noise)
            self.seen.append(
                {
                    "step": trainer.global_step,
                    "sigma": sigma.tolist(),
                    "noise": noise[:, 0, 0, 0, 0].tolist(),
                    "losses": losses.tolist(),
                }
            )
            return losses

        pl_module.losses_of = recorded

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        (self.folder / f"draws-{trainer.global_rank}.json").write_text(json.dumps(self.seen))


def read_draws(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    draws: list[dict[str, Any]] = json.loads((folder / f"draws-{rank}.json").read_text())
    return draws


def sigmas(draws: Sequence[dict[str, Any]]) -> list[float]:
    return [sigma for draw in draws for sigma in draw["sigma"]]


# What processes of their own run; `run.task["world"]` is the World.


def validate_and_train(run: Run) -> None:
    """Validation losses of the untrained model to validation.json, then an expert's training with its draws."""
    torch.set_num_threads(1)
    world: World = run.task["world"]
    data = world.data(batch_size=run.task["batch_size"], passes=12)
    task = world.expert(seed=3)
    options = {"devices": run.processes, **run.trainer}
    (found,) = make_trainer(run.folder, limit_val_batches=None, **options).validate(task, data, verbose=False)
    draws = Draws(run.folder)
    trainer = make_trainer(run.folder, max_steps=run.steps, callbacks=[draws], **options)
    if trainer.is_global_zero:
        (run.folder / "validation.json").write_text(json.dumps(found))
    trainer.fit(task, data)


def train_expert(run: Run) -> None:
    """A resumable run of an expert; see resumable.py."""
    world: World = run.task["world"]
    L.seed_everything(0, verbose=False)
    train(run, world.expert(seed=1, lr=1e-2), world.data(batch_size=1))


def train_without_latents(run: Run) -> None:
    """A run whose latents are missing, on the ranks of `run.task["ranks"]`."""
    world: World = run.task["world"]
    if int(os.environ["LOCAL_RANK"]) in run.task["ranks"]:
        world = replace(world, latents=run.folder / "empty")
    train(run, world.expert(), world.data(batch_size=1))


def validate_sharded(run: Run) -> None:
    """Validation of the transformer, sharded over the processes; its losses to validation.json."""
    torch.set_num_threads(1)
    world: World = run.task["world"]
    strategy = ModelParallelStrategy(run.processes, 1) if run.processes > 1 else "auto"
    trainer = make_trainer(run.folder, limit_val_batches=None, devices=run.processes, strategy=strategy)
    (found,) = trainer.validate(
        world.adaptation(), world.data(batch_size=run.task["batch_size"], val_limit=3), verbose=False
    )
    if trainer.is_global_zero:
        (run.folder / "validation.json").write_text(json.dumps(found))


class MappedCheckpoints(L.Callback):
    """Writes the checkpoints that are still mapped into memory after the first step to mapped-RANK.txt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        """The process's own list of what it has mapped."""
        lines = Path("/proc/self/maps").read_text().splitlines()
        mapped = sorted({line.split()[5] for line in lines if ".ckpt" in line})
        (self.folder / f"mapped-{trainer.global_rank}.txt").write_text("\n".join(mapped))


def adapt(run: Run) -> None:
    """A resumable run of the adaptation, sharded or not, with its export."""
    torch.set_num_threads(1)
    world: World = run.task["world"]
    sharded = ModelParallelStrategy(run.processes, 1, save_distributed_checkpoint=False)
    L.seed_everything(0, verbose=False)
    trainer = make_trainer(
        run.folder,
        devices=run.processes,
        strategy=sharded if run.task["sharded"] else "ddp",
        max_steps=run.steps,
        gradient_clip_val=1.0,
        enable_checkpointing=True,
        plugins=AtomicCheckpointIO(),
        callbacks=[Checkpoints(100), RandomState(), Export(run.folder / "export"), MappedCheckpoints(run.folder)],
    )
    options = {name: run.task[name] for name in ("attention", "compile", "offload", "lora_rank") if name in run.task}
    task: FlowMatchingTask = world.adaptation(recompute="all_but_attention", lr=1e-3, warmup_steps=100, **options)
    trainer.fit(task, world.data(batch_size=1), ckpt_path=run.resume)
    if os.environ.get("LOCAL_RANK") == "0":
        (run.folder / "step.txt").write_text(str(trainer.global_step))
