"""Which class a saved VLUer is of, and where it is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from luve_lightning.analysis.model_parts import PartConfigs, Parts
from luve_lightning.cascade import LuVePipeline
from luve_lightning.cascade.stages import upsample
from luve_lightning.losses import LatentL1
from luve_lightning.models.vluer import ReleasedVLUer, VLUer, load_vluer, vluer_class
from luve_lightning.tasks import VLUerTask
from tests.helpers.noise import noise
from tests.helpers.released import small_released
from tests.helpers.tiny_luve import PROMPT, SMALL, tiny_luve
from tests.helpers.upsampling import tiny_vluer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("vluers")
    tiny_vluer().save_pretrained(folder / "ours")
    small_released().save_pretrained(folder / "released")
    return folder / "ours", folder / "released"


def test_a_folder_says_its_class(folders: tuple[Path, Path]) -> None:
    ours, released = (load_vluer(folder) for folder in folders)
    assert (type(ours), type(released)) == (VLUer, ReleasedVLUer)
    assert all(torch.equal(a, b) for a, b in zip(released.parameters(), small_released().parameters(), strict=True))
    assert load_vluer(folders[1], torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert vluer_class({}) is VLUer  # a configuration of before the other class


def test_refuses_another_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match=r"a saved UNet2DModel, expected one of ReleasedVLUer, VLUer$"):
        load_vluer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_vluer(tmp_path / "none")


@torch.no_grad()
def test_a_pipeline_loads_upsamples_and_saves_it(
    tiny_cascade: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    pipeline = LuVePipeline.from_pretrained(tiny_cascade / "wan", vluer=folders[1])
    latents = noise(1, 16, 2, 64, 64)
    got = upsample(pipeline, latents, (512, 576))
    torch.testing.assert_close(got, small_released()(latents, (2, 64, 72)))
    pipeline.save_pretrained(tmp_path)
    assert type(LuVePipeline.from_pretrained(tmp_path).vluer) is ReleasedVLUer


def test_a_pipeline_refuses_its_sizes_before_the_first_stage(tiny_backbone: Path) -> None:
    pipeline = tiny_luve(tiny_backbone, vluer=small_released())
    begun = []
    with pytest.raises(ValueError, match="at least 2 latent frames of 64 x 64"):
        pipeline(PROMPT, callback_on_stage_start=lambda name, steps: begun.append(name), steps=2, skip_steps=0, **SMALL)
    assert begun == []


def test_plans_are_made_of_its_class(tiny_cascade: Path, folders: tuple[Path, Path]) -> None:
    configs = PartConfigs.from_pretrained(tiny_cascade / "wan", folders[1])
    net = Parts(configs, torch.float32).vluer
    assert type(net) is ReleasedVLUer
    assert net.device.type == "meta"
    assert net(torch.empty(1, 16, 2, 64, 64, device="meta"), (2, 96, 96)).shape == (1, 16, 2, 96, 96)


def test_training_starts_from_the_same_class_and_sizes(tiny_backbone: Path, folders: tuple[Path, Path]) -> None:
    def task(net: VLUer | ReleasedVLUer, folder: Path) -> VLUerTask:
        return VLUerTask(net, str(tiny_backbone), {"latent": LatentL1()}, init_from=str(folder))

    with torch.no_grad():
        other = small_released()
        for parameter in other.parameters():
            parameter.zero_()
    started, saved = task(other, folders[1]), small_released()
    assert all(torch.equal(a, b) for a, b in zip(started.net.parameters(), saved.parameters(), strict=True))
    loss = started.losses["latent"](started(noise(1, 16, 2, 64, 64), (2, 16, 72)), noise(1, 16, 2, 16, 72))
    loss.backward()
    torch.optim.Adam(started.net.parameters(), lr=1e-4).step()
    assert not any(torch.equal(a, b) for a, b in zip(started.net.parameters(), saved.parameters(), strict=True))
    with pytest.raises(FileNotFoundError, match=r"init_from: .*: no config\.json there; .* `luve convert vluer`$"):
        task(small_released(), folders[1] / "model.pth")
    with pytest.raises(ValueError, match=r"init_from: .* holds a VLUer, net is a ReleasedVLUer$"):
        task(small_released(), folders[0])
    with pytest.raises(ValueError, match=r"init_from: .* has other sizes than net: 3 weights, first imnet"):
        task(small_released(hidden=(9, 8)), folders[1])
