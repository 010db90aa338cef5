"""A VLUer distilled on a GPU: narrowed as on a CPU, and trained under autocast."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from luve_lightning.callbacks import Export
from luve_lightning.datamodules import LatentPairsDataModule
from luve_lightning.functional.interpolation import interpolate_latents
from luve_lightning.losses import LatentL1
from luve_lightning.models.vluer import VLUer, load_vluer
from luve_lightning.tasks import VLUerDistillationTask
from luve_lightning.tasks.narrowing import narrow
from tests.helpers.resumable import Run, train
from tests.helpers.tiny_luve import noise

STUDENT: dict[str, Any] = {"channels": 12, "pairs": 1, "hidden": 16, "layers": 1, "query_channels": 8}


def teacher() -> VLUer:
    torch.manual_seed(3)
    net = VLUer(channels=24, pairs=2, hidden=32, layers=1, query_channels=16)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.05)
    return net


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_narrowed_as_on_a_cpu(device: torch.device, dtype: torch.dtype) -> None:
    """By how near the students come to the teacher: which of two units that matter alike stays is chance."""
    samples = [(noise(2, 16, 3, 9, 8, seed=seed), (3, 17, 20)) for seed in range(3)]
    latents, size = noise(3, 16, 3, 8, 10, seed=9), (4, 15, 21)
    with torch.no_grad():
        wanted = teacher()(latents, size)
    errors = []
    for where, kind in ((torch.device("cpu"), torch.float32), (device, dtype)):
        large, small = teacher().to(where, kind), VLUer(**STUDENT).to(where, kind)
        before = deepcopy(large.state_dict())
        narrow(large, small, [(x.to(where, kind), to) for x, to in samples])
        assert all(torch.equal(x, before[name]) for name, x in large.state_dict().items())
        with torch.no_grad():
            errors.append((small(latents.to(where, kind), size).float().cpu() - wanted).square().mean().item())
    assert errors[1] == pytest.approx(errors[0], rel=0.01 if dtype == torch.float32 else 0.2)
    plain = (interpolate_latents(latents, size, "bilinear") - wanted).square().mean().item()
    assert errors[0] < 0.7 * plain


def test_it_trains_under_autocast(
    device: torch.device, tmp_path: Path, tiny_backbone: Path, tiny_clips: Path, tiny_latents: Path
) -> None:
    teacher().save_pretrained(tmp_path / "teacher")
    net = VLUer(**STUDENT)
    task = VLUerDistillationTask(
        net, str(tiny_backbone), {"latent": LatentL1()}, str(tmp_path / "teacher"), {"output": LatentL1()},
        feature_weight=0.1, samples=2, lr=1e-3,
    )  # fmt: skip
    data = LatentPairsDataModule(
        tiny_clips / "clips.csv", tiny_latents, str(tiny_backbone), (48, 48), [1.5, 2.0], 9, crop=(3, 6, 6), passes=3
    )
    options = {"accelerator": "gpu" if device.type == "cuda" else "cpu", "precision": "bf16-mixed"}
    run = Run(tmp_path, steps=3, trainer=options, callbacks=(Export(tmp_path / "vluer"),))
    trainer = train(run, task, data)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert type(load_vluer(tmp_path / "vluer")) is VLUer
    assert all(torch.equal(x.cpu(), teacher().state_dict()[name]) for name, x in task.teacher.state_dict().items())
