"""A tiny VLUer task and clips at two scales, for what compares and draws upsamplers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from luve_lightning.callbacks import UpsamplerComparison
from luve_lightning.functional.pixels import resize_video
from luve_lightning.losses import LatentL1
from luve_lightning.models.backbones import load_backbone
from luve_lightning.models.vluer import VLUer
from luve_lightning.tasks import VLUerTask
from tests.helpers.resumable import Run

SCALES = (1.5, 2.0)
SIZE = 48  # 6 latents; 4 at 1.5x and 3 at 2x
FRAMES = 5


def tiny_vluer(seed: int = 0, latent_channels: int = 16) -> VLUer:
    """A VLUer whose last convolution is not zero, so that it differs from bilinear."""
    torch.manual_seed(seed)
    net = VLUer(latent_channels, channels=8, pairs=1, hidden=8, layers=1, query_channels=8, decoder_layers=1)
    nn.init.normal_(net.decoder.conv_out.weight, std=0.02)
    return net


def tiny_task(backbone: Path, seed: int = 0) -> VLUerTask:
    return VLUerTask(tiny_vluer(seed), str(backbone), {"latent": LatentL1()}, lr=1e-3)


def tiny_video(seed: int, frames: int = FRAMES, size: int = SIZE) -> Tensor:
    """3 x T x H x W of smooth drifting colours, in [-1, 1]."""
    noise = torch.randn(1, 3, frames, 6, 6, generator=torch.Generator().manual_seed(seed))
    video = torch.nn.functional.interpolate(noise, size=(frames, size, size), mode="trilinear")
    return video[0].clamp(-1, 1)


class TinyPairs(Dataset[dict[str, Any]]):
    """Every clip at every scale, encoded with the backbone's VAE; what WholeLatentPairs gives."""

    def __init__(self, backbone: Path, clips: int) -> None:
        codec = load_backbone(backbone).latent_space()
        self.items: list[dict[str, Any]] = []
        for scale in SCALES:
            for clip in range(clips):
                video = tiny_video(clip).unsqueeze(0)
                low = resize_video(video, (round(SIZE / scale), round(SIZE / scale)))
                item = {"lr": codec.encode(low)[0], "hr": codec.encode(video)[0], "video": video[0]}
                self.items.append(item | {"scale": torch.tensor(scale), "clip_id": f"clip-{clip}"})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


class Shards(L.LightningDataModule):
    """Items given to each process by hand; a process may have none."""

    def __init__(self, items: Dataset[dict[str, Any]], shards: list[list[int]], batch_size: int = 1) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.items, self.shards, self.batch_size = items, shards, batch_size

    def _loader(self) -> DataLoader[dict[str, Any]]:
        assert self.trainer is not None
        part = torch.utils.data.Subset(self.items, self.shards[self.trainer.global_rank])
        return DataLoader(part, batch_size=self.batch_size)

    train_dataloader = val_dataloader = test_dataloader = _loader


def _evaluate(run: Run, verb: str) -> L.Trainer:
    """A Trainer after `verb`, in one of `run.processes` processes.

    `run.task` holds "backbone" and "shards", the items of each process; the table goes to `run.folder`.
    """
    torch.set_num_threads(1)
    items = TinyPairs(run.task["backbone"], clips=3)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=run.processes,
        strategy="ddp" if run.processes > 1 else "auto",
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        callbacks=[UpsamplerComparison(run.folder / "comparison.csv")],
    )
    task, data = tiny_task(run.task["backbone"]), Shards(items, run.task["shards"])
    getattr(trainer, verb)(task, data, verbose=False)
    return trainer


def compare(run: Run) -> None:
    """`trainer.test`."""
    _evaluate(run, "test")


def validate(run: Run) -> None:
    """`trainer.validate`; leaves what every process logged in `metrics-<rank>.json`."""
    trainer = _evaluate(run, "validate")
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    (run.folder / f"metrics-{trainer.global_rank}.json").write_text(json.dumps(metrics))
