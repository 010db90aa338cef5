"""The smallest real WanTransformer3DModel, and inputs for it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample
from torch import Tensor, nn

from luve_lightning.functional.frequency import FrequencyFilter
from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.models.backbones import load_backbone
from luve_lightning.models.backbones.wan import WanBackbone
from luve_lightning.models.experts import ExpertConfig, expert_parameters

LFE = ExpertConfig("attention", 4, 8.0, FrequencyFilter("low", 0.5), SigmaBand(0.875, 1.0))
HFE = ExpertConfig("feed_forward", 3, 3.0, FrequencyFilter("high", 0.5), SigmaBand(0.0, 0.875))


def tiny_transformer(seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    """Two blocks of width 24, random weights; the same seed gives the same weights."""
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 8,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WanTransformer3DModel(**(sizes | changes)).eval()


def in_float64(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """A copy that computes in float64 throughout, where the order of sums alone makes 1e-15 or so.

    diffusers doubles frames in float32, where a value on a boundary rounds up on one machine and down on another.
    """
    exact = copy.deepcopy(vae).double()
    for module in exact.modules():
        if isinstance(module, WanUpsample):
            module.__class__ = nn.Upsample
    return exact


def load_transformer(backbone: str | Path, dtype: torch.dtype | None = None) -> Any:
    """A backbone's transformer."""
    return load_backbone(backbone).denoiser(dtype).module


def flow_scheduler(shift: float) -> Any:
    """The scheduler of Wan's pipelines."""
    return WanBackbone.build_schedule(shift).scheduler


def inputs(
    batch: int = 2, size: tuple[int, int, int] = (2, 12, 10), dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Latents, timesteps and text; `size` is that of the latents, and a token is 1 x 2 x 2 of them."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, *size, generator=generator).to(dtype),
        "timestep": torch.linspace(900, 300, batch),
        "encoder_hidden_states": torch.randn(batch, 3, 8, generator=generator).to(dtype),
    }


def output(transformer: Any, arguments: dict[str, Any]) -> Tensor:
    """The predicted velocity."""
    result: Tensor = transformer(**arguments, return_dict=False)[0]
    return result


def prediction(transformer: Any) -> Tensor:
    """The velocity of two samples of noise at two noise levels, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "hidden_states": torch.randn(2, 16, 2, 4, 6, generator=generator),
        "timestep": torch.tensor([900.0, 100.0]),
        "encoder_hidden_states": torch.randn(2, 16, 16, generator=generator),
    }
    with torch.no_grad():
        return output(transformer, arguments)


def randomise(transformer: WanTransformer3DModel, *names: str, scale: float = 0.3) -> None:
    """Give experts corrections that are not zero, as training would."""
    generator = torch.Generator().manual_seed(2)
    for name in names:
        for parameter in expert_parameters(transformer, name):
            parameter.data = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter)
