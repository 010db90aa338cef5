"""A real WanPipeline of the tiny backbone."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import WanPipeline

from luve_lightning.models.backbones import load_backbone
from tests.helpers.tiny_wan import flow_scheduler, load_transformer


def tiny_pipeline(backbone: Path, shift: float = 5.0) -> WanPipeline:
    """Untrained, but with a last layer that is not near zero: predictions that change from step to step."""
    text = load_backbone(backbone).text()
    transformer = load_transformer(backbone).eval()
    generator = torch.Generator().manual_seed(5)
    transformer.proj_out.weight.data = 0.3 * torch.randn(transformer.proj_out.weight.shape, generator=generator)
    pipeline = WanPipeline(
        tokenizer=text.tokenizer,
        text_encoder=text.encoder,
        vae=load_backbone(backbone).vae(),
        scheduler=flow_scheduler(shift),
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
