"""Plain LoRAs beside experts: loading them into a pipeline, and a transformer with its experts set aside."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from luve_lightning.cascade.lora_files import LoraFile
from luve_lightning.cascade.lora_layers import LoraSummary, check_loaded, fit_lora
from luve_lightning.models.backbones import denoiser_of
from luve_lightning.models.experts import expert_names
from luve_lightning.models.experts.layer import ExpertLayer


@contextmanager
def experts_set_aside(transformer: Any) -> Iterator[None]:
    """Take the experts' layers out of the transformer inside this context; no weight is touched.

    Inside, module names and the state dict are those of a transformer without experts, as diffusers' LoRA loading
    and `save_pretrained` expect.
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


def load_lora(
    transformers: Sequence[Any], file: LoraFile, adapter_name: str | None, pipeline: Any
) -> LoraSummary:
    """Load a LoRA whole into every transformer, or into none.

    Args:
        transformers: one or several.
        file: the LoRA, as `read_lora` read it.
        adapter_name: default diffusers' choice.
        pipeline: pipeline whose offloading diffusers handles.

    Returns:
        What was loaded, at which scale.

    Raises:
        ValueError: for a LoRA that cannot be loaded whole.
    """
    fitted = []
    for transformer in transformers:  # all of them before the first is touched
        with experts_set_aside(transformer):
            fitted.append(fit_lora(transformer, file))
    for transformer, lora in zip(transformers, fitted, strict=True):
        with experts_set_aside(transformer), warnings.catch_warnings():
            there = set(getattr(transformer, "peft_config", {}))
            # Several adapters are intended.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            transformer.load_lora_adapter(
                dict(lora.state_dict),
                network_alphas=None,
                adapter_name=adapter_name,
                metadata=lora.metadata,
                _pipeline=pipeline,
            )
            (new,) = set(transformer.peft_config) - there
            check_loaded(transformer, new, lora)
    return fitted[0].summary


def unload_loras(transformers: Sequence[Any]) -> None:
    """Remove every LoRA; the experts stay."""
    for transformer in transformers:
        with experts_set_aside(transformer):
            transformer.unload_lora()
