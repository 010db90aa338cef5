"""A small Wan transformer with heads of real width, its experts and inputs: what kernels on a GPU are made for."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from luve_lightning.functional.frequency import FrequencyFilter
from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.models.attention import Attention
from luve_lightning.models.attention.dense import Dense
from luve_lightning.models.attention.tiles import Tiles
from luve_lightning.models.attention.windows import Windows
from luve_lightning.models.backbones import denoiser_of
from luve_lightning.models.experts import ExpertConfig, add_expert
from tests.helpers.gpu import DEVICE, coarse
from tests.helpers.noise import noise
from tests.helpers.tiny_wan import randomise

SIZES = {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 512, "num_layers": 3, "text_dim": 32}
EXPERTS = {
    "lfe": ExpertConfig("attention", 16, 16.0, FrequencyFilter("low", 0.5), SigmaBand(0.875, 1.0)),
    "hfe": ExpertConfig("feed_forward", 16, 16.0, FrequencyFilter("high", 0.5), SigmaBand(0.0, 0.875)),
}
SHORT = (3, 16, 12)  # latents; 144 tokens
# 4320 tokens, enough for Tiles to run by blocks; a CPU, which has no kernel for them, is spared.
LONG = (3, 72, 80) if DEVICE.type == "cuda" else (3, 36, 36)
ATTENTIONS: dict[str, Attention | None] = {
    "own": None,
    "dense": Dense(),
    "windows": Windows(((1, 3, 2), (3, 1, 1)), linear=True),
    "tiles": Tiles((2, 8, 8), (1, 3, 3), dense_layers=(1,), linear=True),
}


def wide_transformer(attention: Attention | None = None, experts: tuple[str, ...] = (), **changes: Any) -> Any:
    """Random weights that bfloat16 holds exactly, none of which is zero; always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(**(SIZES | changes)).eval()
        for block in transformer.blocks:
            nn.init.normal_(block.scale_shift_table)  # the gates, too: else a block adds a hundredth to its input
        denoiser = denoiser_of(transformer)
        denoiser.use_attention(attention)
        for branch in denoiser.branches.values():
            for parameter in branch.parameters():
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        for name in experts:
            add_expert(transformer, name, EXPERTS[name], torch.float32)
        if experts:
            randomise(transformer, *experts, scale=0.05)
    return coarse(transformer)


def wide_inputs(batch: int = 1, size: tuple[int, int, int] = SHORT) -> list[Tensor]:
    """Latents, time steps and text; bfloat16 holds them exactly."""
    latents, text = (x.bfloat16().float() for x in (noise(batch, 16, *size), noise(batch, 24, 32)))
    return [latents, torch.linspace(950, 250, batch).round(), text]
