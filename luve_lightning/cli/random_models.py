"""`luve random-models`: a whole cascade's models with random weights, for trying commands at real size."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from luve_lightning.analysis.model_parts import PartConfigs, wan_1_3b
from luve_lightning.analysis.random_models import write_random_models
from luve_lightning.cli import Verb
from luve_lightning.machine import choose_device
from luve_lightning.models.attention import Attention

VERBS = {"random-models": Verb("Measurement", "write a cascade's models with random weights, at real size")}


def random_models(
    output: Path,
    backbone: str | None = None,
    vluer: Path | None = None,
    attention: Attention | None = None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    seed: int = 0,
    refiner_alone: bool = False,
    device: str = "auto",
) -> None:
    """Writes a backbone, a VLUer, an adapted transformer and both experts with random weights.

    Time and memory do not depend on the weights' values: with these folders `luve generate`, `luve precompute` and
    `luve fit` can be tried and timed at real size before any training, and without a download. Videos are noise.

    Args:
        output: New folder; gets backbone/, vluer/, refiner/, experts/lfe/ and experts/hfe/.
        backbone: Folder or hub id whose configuration files give the sizes; default those of Wan2.1-1.3B, 18 GB in
            bfloat16.
        vluer: Folder whose configuration gives the VLUer's size; default the base size.
        attention: Attention of the adapted transformer; default the backbone's own.
        dtype: Dtype of the transformers and the text encoder; the others are float32.
        seed: Seed of the weights.
        refiner_alone: Write only refiner/ and experts/, for instance with another attention for another size.
        device: Where they are drawn: auto (a GPU if there is one), cpu, cuda or cuda:N.
    """
    console, started = Console(emoji=False), time.perf_counter()
    configs = wan_1_3b() if backbone is None else PartConfigs.from_pretrained(backbone, vluer)
    target, kind = choose_device(device), getattr(torch, dtype)
    written = write_random_models(output, configs, kind, target, attention, seed, refiner_alone)
    for name, count in written:
        took = f"{time.perf_counter() - started:.0f} s"
        console.print(f"  {output / name}  {count:,} parameters  ({took})", soft_wrap=True)
