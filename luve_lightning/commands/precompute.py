"""`luve precompute`: encodes clips into the latent store."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from rich.console import Console

from luve_lightning.callbacks.stop_prediction import StopPredictionOnSigterm
from luve_lightning.datamodules.encode import EncodeDataModule
from luve_lightning.datasets.encode_clips import (
    PixelTransform,
    Unchanged,
    WindowReader,
    plan_windows,
    variant_name,
)
from luve_lightning.datasets.file_hashes import FileHashes
from luve_lightning.datasets.latent_pairs_index import quarantine_path
from luve_lightning.datasets.latent_recipe import LatentRecipe, check_scales
from luve_lightning.datasets.latent_store import LatentStore
from luve_lightning.datasets.quarantine import Quarantine
from luve_lightning.datasets.video_index import ClipEntry, VideoIndex
from luve_lightning.models.backbone import LatentCodec
from luve_lightning.tasks.encode import EncodeTask, EncodeTotals

Split = Literal["train", "val", "test"]


def precompute(
    backbone: str,
    index: Path,
    store: Path,
    size: tuple[int, int],
    scales: list[float],
    frames: int,
    splits: list[Split] | None = None,
    clips: Path | None = None,
    start: int = 0,
    windows: int = 1,
    stride: int = 1,
    variants: dict[str, PixelTransform] | None = None,
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    batch_size: int = 4,
    num_workers: int = 0,
    max_bad_fraction: float = 0.05,
    trainer: dict[str, Any] | None = None,
) -> None:
    """Encodes clips at high resolution and at each lower one, and stores the latents.

    What is stored already is skipped before its clip is decoded, so an interrupted run goes on where it stopped.
    Several runs may share a store. Unreadable clips are named in quarantine.jsonl in the store, and left out.

    Args:
        backbone: Folder or hub id of the diffusers pipeline whose VAE encodes.
        index: CSV with UltraVideo's columns.
        store: Folder of the latent store.
        size: Height and width of the high-resolution pixels; larger clips are cropped to this aspect ratio
            around their centre and downscaled.
        scales: How many times smaller each low-resolution version is, e.g. [1.5, 2, 3].
        frames: Frames of a window, 4k+1.
        splits: Which of train, val and test to encode; default all clips.
        clips: Folder of the clips; default clips/ beside the CSV, else the CSV's own folder.
        start: First frame of the first window.
        windows: Windows of each clip, equally spaced from start to its end.
        stride: Every stride-th frame is read.
        variants: What to do to the pixels first, by name; default {plain: unchanged}.
        dtype: Dtype on disk.
        batch_size: Windows encoded at once.
        num_workers: Processes that decode ahead; 0 decodes between the encodes.
        max_bad_fraction: Share of windows that may be unreadable before the run stops.
        trainer: Lightning Trainer options, e.g. {accelerator: gpu, devices: 8, strategy: ddp}.
    """
    started = time.perf_counter()
    codec = LatentCodec.from_pretrained(backbone)
    check_scales(size, scales, codec.spatial_ratio)
    codec.latent_size(frames, *size)
    transforms = variants or {"plain": Unchanged()}
    names = tuple(variant_name(name, transform) for name, transform in transforms.items())
    recipe = LatentRecipe(
        codec.fingerprint(), size, tuple(scales), frames, start, windows, stride, names, dtype
    )
    latents = LatentStore(store)
    read = WindowReader(recipe, latents, FileHashes(latents.root))
    entries = _entries(VideoIndex.from_csv(index, clips), splits)
    planned, short = plan_windows(entries, recipe)
    runner = _trainer(trainer)
    console = Console(quiet=not runner.is_global_zero)
    console.print(
        f"{len(entries)} clips, {len(planned)} windows of {recipe.count} latents, VAE {recipe.vae[:12]}"
    )
    if runner.is_global_zero:
        latents.clean()
        too_short = Quarantine(quarantine_path(latents), max_bad_fraction, len(entries))
        for error in short:
            too_short.add(error)
    bad = Quarantine(quarantine_path(latents), max_bad_fraction, -(-len(planned) // runner.world_size))
    task = EncodeTask(codec, read, transforms, bad, batch_size)
    _predict(runner, task, EncodeDataModule(planned, read, batch_size, num_workers))
    there = (len(planned) - task.totals.bad) * recipe.count - task.totals.encoded
    console.print(_summary(task.totals, there, len(short), latents, time.perf_counter() - started))


def _entries(index: VideoIndex, splits: Sequence[Split] | None) -> list[ClipEntry]:
    if splits is None:
        return list(index.entries)
    return [entry for split in splits for entry in index.split(split)]


def _trainer(options: dict[str, Any] | None) -> L.Trainer:
    """A Trainer that predicts and leaves nothing behind."""
    with warnings.catch_warnings():
        # Lightning recommends a GPU or more loader workers whatever was asked for.
        warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
        return L.Trainer(
            **{
                "logger": False,
                "enable_checkpointing": False,
                "enable_model_summary": False,
                **(options or {}),
                # The DataModule shards by itself, and each process must reach the end of the loop.
                "use_distributed_sampler": False,
                "callbacks": [StopPredictionOnSigterm()],
            }
        )


def _predict(runner: L.Trainer, task: EncodeTask, data: EncodeDataModule) -> None:
    """Run the task; when this process fails, its helpers must not go on by themselves."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            warnings.filterwarnings("ignore", message="Total length of `DataLoader` across ranks is zero")
            runner.predict(task, datamodule=data, return_predictions=False)
    except BaseException:
        launcher = runner.strategy.launcher
        if launcher is not None:
            launcher.kill(signal.SIGTERM)
        raise


def _summary(totals: EncodeTotals, there: int, short: int, store: LatentStore, seconds: float) -> str:
    bad = totals.bad + short
    where = f" windows, see {quarantine_path(store)}" if bad else ""
    return (
        f"{store.root}\n"
        f"  encoded        {totals.encoded} latents, {totals.bytes / 2**20:.1f} MiB, {seconds:.0f} s\n"
        f"  already there  {there}\n"
        f"  quarantined    {bad}{where}"
    )
