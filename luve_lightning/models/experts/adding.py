"""Adding experts to a transformer, and choosing what is trained."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from luve_lightning.models.backbones import Denoiser, denoiser_of
from luve_lightning.models.experts.config import ExpertConfig
from luve_lightning.models.experts.layer import ExpertLayer, custom_modules, expert_layers, site_names
from luve_lightning.models.experts.routing import activate, install, state_of

# Part of the weights' names; PEFT recognises its weights by "lora_".
_NAME = re.compile(r"(?!lora_)[A-Za-z][A-Za-z0-9_-]*", re.ASCII)


def add_expert(
    transformer: Any,
    name: str,
    config: ExpertConfig,
    dtype: torch.dtype | None = None,
) -> None:
    """Add an expert as a named PEFT adapter. Only it is then active and trainable; its correction is zero.

    Args:
        transformer: not compiled, wrapped or quantised; may hold other experts and adapters.
        name: new; letters, digits, "_" and "-".
        config: the expert's place, rank, filter and band.
        dtype: dtype of its weights; default the wrapped modules'. float32 beside a bfloat16 base keeps small
            updates.

    Raises:
        ValueError: for an existing or invalid name, or a transformer that cannot take an expert.
    """
    inject(transformer, name, config, dtype)
    train_only(transformer, name)


def inject(transformer: Any, name: str, config: ExpertConfig, dtype: torch.dtype | None) -> dict[str, Any]:
    """Add an expert, frozen and active; other adapters stay. Returns the layers that hold it, by name."""
    check_can_take(transformer, name)
    denoiser = denoiser_of(transformer)
    lora = lora_config(denoiser, config)
    lora._register_custom_module(custom_modules(denoiser))
    trained = {id(p): p.requires_grad for n, p in transformer.named_parameters() if "lora_" in n}
    others = {
        module: list(module.active_adapters)
        for module in transformer.modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, ExpertLayer)
    }
    with warnings.catch_warnings():  # several adapters are intended
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        transformer.add_adapter(lora, name)
    # diffusers has disabled every other adapter, even a plain LoRA that adapts the base.
    for module, names in others.items():
        module.set_adapter(names)
    state = install(transformer)
    state.configs[name] = config
    layers = expert_layers(denoiser, config)
    for layer in layers.values():
        layer.expert_state = state
        layer.lora_A[name].to(dtype)
        layer.lora_B[name].to(dtype)
    for n, parameter in transformer.named_parameters():
        if "lora_" in n:
            parameter.requires_grad_(trained.get(id(parameter), False))
    activate(transformer, name)
    return layers


def lora_config(denoiser: Denoiser, config: ExpertConfig, **options: Any) -> LoraConfig:
    """PEFT's configuration of an expert."""
    alpha = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
    return LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=site_names(denoiser, config), **options)


def check_can_take(transformer: Any, name: str) -> None:
    """Raise one clear line when this transformer cannot take an expert of this name."""
    try:
        denoiser_of(transformer)
    except ValueError:
        raise ValueError(
            "experts go into a backbone's transformer before it is wrapped or compiled, "
            f"got {type(transformer).__name__}"
        ) from None
    if name in getattr(transformer, "peft_config", {}):
        raise ValueError(f"expert {name!r}: the transformer has an adapter of this name already")
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"expert name {name!r}: expected letters, digits, '_' and '-', not starting with lora_"
        )
    kinds = {p.dtype for p in transformer.parameters()} - {
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    }
    if kinds or getattr(transformer, "hf_quantizer", None) is not None:
        found = ", ".join(sorted(map(str, kinds))) or "a quantiser"
        raise ValueError(
            f"the transformer is quantised ({found}): experts need float16, bfloat16 or float32 weights"
        )


def expert_parameters(transformer: Any, name: str) -> list[nn.Parameter]:
    """A and B of an expert, block by block.

    Raises:
        ValueError: for an unknown expert.
    """
    config = state_of(transformer, name).configs[name]
    layers = expert_layers(denoiser_of(transformer), config).values()
    return [part[name].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]


def train_only(transformer: Any, name: str | None) -> None:
    """Train one expert and freeze everything else, or everything when None; independent of `activate`.

    Needed wherever a transformer holds two adapters: PEFT leaves both trainable.

    Raises:
        ValueError: for an unknown expert.
    """
    chosen = [] if name is None else expert_parameters(transformer, name)
    transformer.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
