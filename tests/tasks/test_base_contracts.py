"""Tasks keep what callbacks and evaluation ask of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luve_lightning.losses import LatentL1
from luve_lightning.tasks import AdaptationTask, BackboneTask, ExpertTask, VLUerDistillationTask, VLUerTask
from luve_lightning.tasks.base import Denoising, ExpertComparison, Exporting, TextToVideo, Upsampling, keeps
from tests.helpers.tiny_flow import LFE
from tests.helpers.upsampling import tiny_vluer

CONTRACTS = {Denoising, ExpertComparison, Exporting, TextToVideo, Upsampling}


@pytest.fixture(scope="module")
def tasks(tiny_backbone: Path, tiny_clips: Path, tiny_cascade: Path) -> dict[str, Any]:
    backbone = str(tiny_backbone)
    sizes: tuple[dict[str, int], dict[str, int]] = (
        {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 1, "freq_dim": 16},
        {"d_model": 16, "num_heads": 2, "d_kv": 8, "d_ff": 16, "num_layers": 1},
    )
    return {
        "adaptation": AdaptationTask(backbone),
        "expert": ExpertTask(backbone, LFE, "lfe"),
        "backbone": BackboneTask(tiny_backbone, tiny_clips / "clips.csv", *sizes, length=9),
        "vluer": VLUerTask(tiny_vluer(), backbone, {"latent": LatentL1()}),
        "distilled": VLUerDistillationTask(
            tiny_vluer(), backbone, {"latent": LatentL1()}, str(tiny_cascade / "vluer"), {"output": LatentL1()}
        ),
    }


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("adaptation", {Denoising, Exporting}),
        ("expert", {Denoising, Exporting, ExpertComparison}),
        ("backbone", {Denoising, Exporting, TextToVideo}),
        ("vluer", {Exporting, Upsampling}),
        ("distilled", {Exporting, Upsampling}),
    ],
)
def test_each_task_keeps_its_contracts_and_no_other(tasks: dict[str, Any], name: str, kept: set[type]) -> None:
    assert {contract for contract in CONTRACTS if keeps(tasks[name], contract)} == kept
