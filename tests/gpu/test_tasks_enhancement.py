"""The cascades that only enhance, on a GPU: a new condition is nothing, and what is trained refines there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from luve_lightning.callbacks import Export
from luve_lightning.cascade import LuVePipeline
from luve_lightning.cascade.stages import refine
from luve_lightning.models.backbones import load_backbone
from luve_lightning.tasks import EnhancementTask
from tests.helpers.gpu import DEVICE
from tests.helpers.tiny_cascade import RIVALS
from tests.helpers.tiny_flow import World, make_trainer
from tests.helpers.tiny_luve import noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_condition_changes_nothing_to_the_bit(device: torch.device, world: World, dtype: torch.dtype) -> None:
    narrow, wide = (load_backbone(world.backbone).denoiser(dtype) for _ in range(2))
    wide.take_condition()
    narrow.module.to(device)
    wide.module.to(device)
    latents, other = (noise(3, 16, 2, 8, 12, seed=seed).to(device, dtype) for seed in (0, 1))
    given: Any = torch.full((3,), 500.0, device=device), noise(3, 16, narrow.text_dim).to(device, dtype)
    with torch.no_grad():
        assert torch.equal(wide.velocity(latents, *given, condition=other), narrow.velocity(latents, *given))


@pytest.mark.parametrize("kind", RIVALS)
def test_it_trains_and_refines(
    device: torch.device, world: World, tiny_cascade: Path, tmp_path: Path, kind: type[EnhancementTask]
) -> None:
    """Under autocast, with a VLUer; then in bfloat16 in the cascade."""
    vluer = str(tiny_cascade / "vluer")
    task = kind(str(world.backbone), vluer=vluer, lora_rank=2, lr=1e-2, recompute="all_but_attention")
    options: dict[str, Any] = {"accelerator": "gpu" if device.type == "cuda" else "cpu", "precision": "bf16-mixed"}
    options |= {"check_val_every_n_epoch": None, "val_check_interval": 3, "limit_val_batches": None}
    trainer = make_trainer(tmp_path, max_steps=3, callbacks=[Export(tmp_path / "export")], **options)
    trainer.fit(task, world.data(low_scale=2, batch_size=2))
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
    pipeline = LuVePipeline.from_pretrained(
        tiny_cascade / "wan", vluer, refiner=tmp_path / "export", torch_dtype=torch.bfloat16
    ).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    found = refine(
        pipeline, noise(3, 16, 2, 8, 12), ["x"] * 3, refinement=kind.refinement, steps=3, skip_steps=0, guidance=2.0
    )
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert (found - noise(3, 16, 2, 8, 12).to(found)).abs().max() > 0.1
