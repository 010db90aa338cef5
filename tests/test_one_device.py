"""What runs on a GPU takes nothing from the CPU: models and losses, tried on a GPU without values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from luve_lightning.losses import LatentL1, PixelL1
from luve_lightning.models.backbones import denoiser_of, latent_space_of
from luve_lightning.models.experts import activate
from luve_lightning.tasks import AdaptationTask, ExpertTask, VLUerTask
from tests.helpers.fake_gpu import GPU, on_gpu
from tests.helpers.released import small_released
from tests.helpers.tiny_flow import LFE
from tests.helpers.upsampling import tiny_vluer
from tests.helpers.wide_wan import ATTENTIONS, SHORT, wide_transformer

LONG = (3, 72, 80)  # latents; enough tokens for Tiles to run by blocks


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, device=GPU)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_a_transformer(kind: str) -> None:
    transformer = wide_transformer(ATTENTIONS[kind], ("lfe", "hfe"), num_layers=2)
    with FakeTensorMode(), torch.no_grad():
        on_gpu(transformer)
        for expert, size in (("lfe", SHORT), ("hfe", LONG)):
            activate(transformer, expert)
            found = denoiser_of(transformer).velocity(empty(2, 16, *size), empty(2), empty(2, 24, 32))
            assert found.device == GPU


@pytest.mark.parametrize("tile", [None, (2, 3)])
def test_a_latent_space(tile: tuple[int, int] | None) -> None:
    vae = AutoencoderKLWan(base_dim=4, num_res_blocks=1)
    with FakeTensorMode():
        space = latent_space_of(on_gpu(vae), tile)
        assert space.encode(empty(2, 3, 5, 32, 40)).device == GPU
        assert space.decode(empty(2, 16, 2, 4, 5)).device == GPU
        assert space.decode_differentiable(empty(2, 16, 2, 4, 5)).device == GPU


@pytest.mark.parametrize("made", [tiny_vluer, small_released])
def test_a_vluer(made: Any) -> None:
    net = made()
    with FakeTensorMode(), torch.no_grad():
        assert on_gpu(net)(empty(1, 16, 2, 64, 64), (2, 64, 64)).device == GPU


@pytest.mark.parametrize("name", ["adaptation", "expert"])
def test_losses_of_a_transformer(tiny_backbone: Path, name: str) -> None:
    made: dict[str, Any] = {"adaptation": AdaptationTask, "expert": lambda backbone: ExpertTask(backbone, LFE, "lfe")}
    task = made[name](str(tiny_backbone))
    with FakeTensorMode():
        text = empty(2, 5, on_gpu(task).denoiser.text_dim)
        assert task.losses_of(empty(2, 16, 3, 6, 8), text, empty(2), empty(2, 16, 3, 6, 8)).device == GPU


def test_a_training_step_of_a_vluer(tiny_backbone: Path) -> None:
    task: Any = VLUerTask(tiny_vluer(), str(tiny_backbone), {"latent": LatentL1(), "pixel": PixelL1()})
    task.log = task.log_dict = lambda *_, **__: None  # there is no Trainer
    with FakeTensorMode():
        on_gpu(task)
        batch = {"lr": empty(2, 16, 2, 3, 4), "hr": empty(2, 16, 3, 6, 8), "video": empty(2, 3, 9, 48, 64)}
        assert task.training_step(batch, 0).device == GPU
