"""`luve bench --subject vluer-train`: one optimiser step of experiments/vluer/wan2.1.yaml, phase 1 and phase 2."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luve_lightning.analysis.benchmarks.vluer import require_gpu, time_on_gpu
from luve_lightning.losses import FrameDifferenceL1, LatentL1, PixelL1
from luve_lightning.models.backbones import family_named
from luve_lightning.models.vluer import VLUer
from luve_lightning.tasks.vluer import VLUerTask


def measure(
    device: torch.device, repeats: int = 20, batch_size: int = 2, crop: int = 60, frames: int = 11
) -> list[dict[str, Any]]:
    """Time one optimiser step of the base VLUer with a random Wan2.1 VAE, phase 1 and phase 2.

    Args:
        device: a GPU.
        repeats: timed steps after three to warm up; the median counts.
        batch_size: batch size of the step.
        crop: high-resolution latent height and width.
        frames: latent frames.

    Raises:
        ValueError: another device.
    """
    require_gpu(device)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        family = family_named("wan")
        family.save_vae(family.build_vae({}), Path(folder), torch.bfloat16)
        task = VLUerTask(
            net=VLUer(),
            backbone=folder,
            losses={"latent": LatentL1(), "pixel": PixelL1(), "frame": FrameDifferenceL1()},
            codec_dtype="bfloat16",
        ).to(device)
    optimizer = torch.optim.AdamW(task.net.parameters(), lr=2e-4)
    low = torch.randn(batch_size, 16, frames, crop // 2, crop // 2, device=device)
    high = torch.randn(batch_size, 16, frames, crop, crop, device=device)

    def step(phase: int) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            prediction = task(low, (frames, crop, crop))
            loss = task.losses["latent"](prediction, high)
            if phase == 2:
                pixels = task.decoded_crops(prediction, high, step=0)
                loss = loss + task.losses["pixel"](*pixels) + task.losses["frame"](*pixels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    rows = []
    for phase in (1, 2):
        row = {"subject": "vluer-train", "phase": phase, "batch_size": batch_size, "crop": [frames, crop, crop]}
        rows.append(row | {"pixel_crop": list(task.pixel_crop)} | time_on_gpu(partial(step, phase), device, repeats))
    return rows
