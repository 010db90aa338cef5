"""All that `luve generate` takes, tiny: a backbone's whole folder, a VLUer, a refiner, its experts, and the rivals'."""

from __future__ import annotations

from pathlib import Path

import torch

from luve_lightning.models.backbones import denoiser_of
from luve_lightning.models.experts import save_expert
from luve_lightning.tasks import EnhancementTask, FlashVideoTask, LaVieTask, WaverTask
from tests.helpers.tiny_luve import EXPERTS, other_transformer, tiny_luve


def write_cascade(folder: Path, backbone: Path) -> Path:
    """`wan/`, `vluer/`, `refiner/`, `experts/lfe/`, `experts/hfe/` and rivals under a folder, which is returned."""
    pipeline = tiny_luve(backbone, EXPERTS, refiner=True)
    for name in EXPERTS:
        save_expert(pipeline.refiner, name, folder / "experts" / name)
    pipeline.vluer.save_pretrained(folder / "vluer")
    other_transformer(backbone).save_pretrained(folder / "refiner")
    tiny_luve(backbone, vluer=None).save_pretrained(folder / "wan")
    for rival in RIVALS:
        write_rival(folder / "rivals" / rival.refinement, backbone, rival)
    return folder


RIVALS: tuple[type[EnhancementTask], ...] = (FlashVideoTask, LaVieTask, WaverTask)


def write_rival(folder: Path, backbone: Path, rival: type[EnhancementTask]) -> None:
    """The refiner of a cascade that only enhances, with weights that heed what it is given."""
    denoiser = denoiser_of(other_transformer(backbone))
    rival.set_up(denoiser, 0)
    if denoiser.conditioned:
        embedding = denoiser.module.patch_embedding.weight.data[:, denoiser.channels :]
        embedding.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    denoiser.save(folder, torch.float32)
