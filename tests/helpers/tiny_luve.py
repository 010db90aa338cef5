"""A tiny LuVePipeline with experts that do something."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from luve_lightning.cascade import LuVePipeline
from luve_lightning.models.backbones import load_backbone
from luve_lightning.models.experts import ExpertConfig, activate, add_expert
from tests.helpers.tiny_wan import HFE, LFE, flow_scheduler, load_transformer, randomise
from tests.helpers.upsampling import tiny_vluer

EXPERTS = {"lfe": LFE, "hfe": HFE}
PLAIN = {name: replace(config, filter=None) for name, config in EXPERTS.items()}
PROMPT = "a red boat sails"
SMALL = {"height": 32, "width": 48, "num_frames": 5}


def tiny_luve(
    backbone: Path,
    experts: Mapping[str, ExpertConfig] | None = None,
    trained: bool = True,
    refiner: bool = False,
    **changes: Any,
) -> LuVePipeline:
    """A pipeline of the tiny backbone; `trained` gives the experts corrections that are not zero."""
    text = load_backbone(backbone).text()
    parts = {
        "tokenizer": text.tokenizer,
        "text_encoder": text.encoder,
        "vae": load_backbone(backbone).vae(),
        "scheduler": flow_scheduler(5.0),
        "transformer": load_transformer(backbone).eval(),
        "refiner": other_transformer(backbone) if refiner else None,
        "vluer": tiny_vluer().eval(),
    }
    pipeline = LuVePipeline(**(parts | changes))
    pipeline.set_progress_bar_config(disable=True)
    add_experts(pipeline.refinement_transformer, experts or {}, trained)
    return pipeline


def plain_pipeline(cascade: Path) -> LuVePipeline:
    """The pipeline of `tiny_cascade` without upsampler, refiner and experts, quiet."""
    found: LuVePipeline = LuVePipeline.from_pretrained(cascade / "wan", experts={})
    found.set_progress_bar_config(disable=True)
    return found


def other_transformer(backbone: Path) -> WanTransformer3DModel:
    """The backbone's transformer with other weights, as adapting it gives."""
    transformer = load_transformer(backbone).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in transformer.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return transformer


def add_experts(transformer: WanTransformer3DModel, experts: Mapping[str, ExpertConfig], trained: bool = True) -> None:
    for name, config in experts.items():
        add_expert(transformer, name, config)
        if trained:
            randomise(transformer, name)
    if experts:
        activate(transformer, None)
        transformer.requires_grad_(False)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))
