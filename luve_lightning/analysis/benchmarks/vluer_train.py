"""`luve bench --subject vluer-train`: an optimiser step of the base VLUer and of the released one, in both phases."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luve_lightning.analysis.benchmarks.vluer import require_gpu, time_on_gpu
from luve_lightning.losses import FrameDifferenceL1, LatentL1, PixelL1
from luve_lightning.models.backbones import family_named
from luve_lightning.models.vluer import BaseVLUer, ReleasedVLUer, VLUer
from luve_lightning.tasks.vluer import VLUerTask


def measure(
    device: torch.device, repeats: int = 20, batch_size: int = 2, crop: int = 128, frames: int = 11
) -> Iterator[dict[str, Any]]:
    """Time one optimiser step of either network on the same pairs, with a random Wan2.1 VAE, phase 1 and phase 2.

    Args:
        device: a GPU.
        repeats: timed steps after three to warm up; the median counts.
        batch_size: batch size of the step.
        crop: high-resolution latent height and width, twice the low resolution's; 128 is the released recipe's at 2x,
            and the least that the released network takes. It has no row for smaller crops and no multiples of 16.
        frames: latent frames.

    Raises:
        ValueError: another device.
    """
    require_gpu(device)
    torch.manual_seed(0)
    low = torch.randn(batch_size, 16, frames, crop // 2, crop // 2, device=device)
    high = torch.randn(batch_size, 16, frames, crop, crop, device=device)
    yield from time_steps(VLUer(), low, high, repeats)
    if crop >= 128 and crop % 16 == 0:
        yield from time_steps(ReleasedVLUer(), low, high, repeats)


def time_steps(net: BaseVLUer, low: Tensor, high: Tensor, repeats: int) -> Iterator[dict[str, Any]]:
    """Rows of one network's steps, in bfloat16 autocast."""
    device, size = low.device, (high.shape[2], high.shape[3], high.shape[4])
    with tempfile.TemporaryDirectory() as folder:
        family = family_named("wan")
        family.save_vae(family.build_vae({}), Path(folder), torch.bfloat16)
        task = VLUerTask(
            net=net,
            backbone=folder,
            losses={"latent": LatentL1(), "pixel": PixelL1(), "frame": FrameDifferenceL1()},
            codec_dtype="bfloat16",
        ).to(device)
    optimizer = torch.optim.AdamW(task.net.parameters(), lr=2e-4)

    def step(phase: int) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            prediction = task(low, size)
            loss = task.losses["latent"](prediction, high)
            if phase == 2:
                pixels = task.decoded_crops(prediction, high, step=0)
                loss = loss + task.losses["pixel"](*pixels) + task.losses["frame"](*pixels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    about = {"subject": "vluer-train", "model": type(net).__name__, "parameters": task.net.num_parameters()}
    about |= {"batch_size": len(low), "crop": list(size), "pixel_crop": list(task.pixel_crop)}
    for phase in (1, 2):
        yield about | {"phase": phase} | time_on_gpu(partial(step, phase), device, repeats)
