"""Training and exporting a small VAE."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luve_lightning.datamodules import ClipsDataModule
from luve_lightning.datamodules.clips import View
from luve_lightning.losses import LatentL1, PixelMSE
from luve_lightning.models.backbones import load_backbone
from luve_lightning.tasks import AutoencoderTask

TINY = {"base_dim": 4, "z_dim": 16, "num_res_blocks": 1}


def task(**options: object) -> AutoencoderTask:
    torch.manual_seed(0)
    return AutoencoderTask(dict(TINY), {"mse": PixelMSE()}, **options)  # type: ignore[arg-type]


def test_export_measures_the_saved_weights(tiny_clips: Path, tmp_path: Path) -> None:
    model = task()
    before = {k: v.clone() for k, v in model.vae.state_dict().items()}
    data = ClipsDataModule(tiny_clips / "clips.csv", {"a": View(1, 32)}, val_frames=5)
    data.setup("test")
    model.export(tmp_path, data)
    assert all(torch.equal(v, before[k]) for k, v in model.vae.state_dict().items())
    codec = load_backbone(tmp_path).latent_space()
    latents = torch.cat([codec.encode(batch["video"]) for batch in data.statistics_dataloader()])
    by_channel = latents.permute(1, 0, 2, 3, 4).flatten(1)
    # Normalised latents of the very clips that were measured: zero mean, unit variance.
    assert by_channel.mean(1).abs().max() < 1e-3
    assert (by_channel.std(1, correction=0) - 1).abs().max() < 1e-3


def test_init_from_continues(tiny_backbone: Path) -> None:
    model = task(init_from=str(tiny_backbone))
    reference = load_backbone(tiny_backbone).latent_space().vae.state_dict()
    assert all(torch.equal(v, reference[k]) for k, v in model.vae.state_dict().items())


@pytest.mark.slow
def test_a_step_learns() -> None:
    model = task()
    model.log = model.log_dict = lambda *args, **kwargs: None  # type: ignore[assignment]
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    batch = {"video": torch.rand(2, 3, 5, 16, 16) * 2 - 1}
    losses = []
    for step in range(25):
        loss = model.training_step(batch, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"all in pixel space; wrong: \['latent'\]"):
        AutoencoderTask(dict(TINY), {"latent": LatentL1()})
    with pytest.raises(ValueError, match=r"vae\.in_channels: expected 3, three colours in patches of 1x1, got 12"):
        AutoencoderTask(TINY | {"patch_size": None, "in_channels": 12, "out_channels": 12}, {"mse": PixelMSE()})
    with pytest.raises(FileNotFoundError, match="init_from"):
        task(init_from=str(tmp_path))
