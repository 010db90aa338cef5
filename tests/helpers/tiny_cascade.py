"""All that `luve generate` takes, tiny: a backbone's whole folder, a VLUer, a refiner and its experts."""

from __future__ import annotations

from pathlib import Path

from luve_lightning.models.experts import save_expert
from tests.helpers.tiny_luve import EXPERTS, other_transformer, tiny_luve


def write_cascade(folder: Path, backbone: Path) -> Path:
    """`wan/`, `vluer/`, `refiner/`, `experts/lfe/` and `experts/hfe/` under a folder, which is returned."""
    pipeline = tiny_luve(backbone, EXPERTS, refiner=True)
    for name in EXPERTS:
        save_expert(pipeline.refiner, name, folder / "experts" / name)
    pipeline.vluer.save_pretrained(folder / "vluer")
    other_transformer(backbone).save_pretrained(folder / "refiner")
    tiny_luve(backbone, vluer=None).save_pretrained(folder / "wan")
    return folder
