"""Plain LoRAs beside experts: a transformer without its experts for a while, and which adapters are none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from luve_lightning.models.backbones import denoiser_of
from luve_lightning.models.experts import expert_names
from luve_lightning.models.experts.layer import ExpertLayer


@contextmanager
def experts_set_aside(transformer: Any) -> Iterator[None]:
    """Take the experts' layers out of the transformer for a while; no weight is touched.

    Inside, module names and the state dict are those of a transformer without experts, which is what diffusers'
    loading and removing of LoRAs and its `save_pretrained` know.
    """
    denoiser = denoiser_of(transformer)
    taken = [
        (block, name, layer)
        for _, block in denoiser.blocks
        for name in denoiser.sites.values()
        if isinstance(layer := block.get_submodule(name), ExpertLayer)
    ]
    experts = expert_names(transformer)
    configs = {name: transformer.peft_config.pop(name) for name in experts}
    for block, name, layer in taken:
        block.set_submodule(name, layer.base_layer)
    try:
        yield
    finally:
        for block, name, layer in taken:
            block.set_submodule(name, layer)
        if configs:  # diffusers drops the whole table together with the last LoRA
            left = getattr(transformer, "peft_config", {})
            transformer.peft_config = configs | left
            transformer._hf_peft_config_loaded = True


def plain_loras(transformer: Any) -> list[str]:
    """Names of the transformer's adapters that are not experts."""
    experts = expert_names(transformer)
    return [name for name in getattr(transformer, "peft_config", {}) if name not in experts]
