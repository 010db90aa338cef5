"""Plain LoRAs beside experts: loading other people's into a transformer that has experts, and saving without them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import WanTransformer3DModel
from torch import Tensor

from luve_lightning.models.experts import expert_names
from luve_lightning.models.experts.config import MODULES
from luve_lightning.models.experts.layer import ExpertLayer

# Wrappers' prefixes and PEFT's name of the adapter, which some trainers leave in their files.
_WRAPPER = re.compile(r"^(?:base_model\.model\.|pipe\.dit\.|dit\.|module\.)+")
_ADAPTER = re.compile(r"\.(lora_[AB])\.[^.]+\.weight$")


@contextmanager
def experts_set_aside(transformer: WanTransformer3DModel) -> Iterator[None]:
    """Take the experts' layers out of the transformer for a while; no weight is touched.

    Inside, module names and the state dict are those of a transformer without experts, which is what diffusers'
    loading and removing of LoRAs and its `save_pretrained` know.
    """
    taken = [
        (block, name, layer)
        for block in transformer.blocks
        for name in MODULES.values()
        if isinstance(layer := getattr(block, name), ExpertLayer)
    ]
    experts = expert_names(transformer)
    configs = {name: transformer.peft_config.pop(name) for name in experts}
    for block, name, layer in taken:
        setattr(block, name, layer.base_layer)
    try:
        yield
    finally:
        for block, name, layer in taken:
            setattr(block, name, layer)
        if configs:  # diffusers drops the whole table together with the last LoRA
            left = getattr(transformer, "peft_config", {})
            transformer.peft_config = configs | left
            transformer._hf_peft_config_loaded = True


def plain_loras(transformer: WanTransformer3DModel) -> list[str]:
    """Names of the transformer's adapters that are not experts."""
    experts = expert_names(transformer)
    return [name for name in getattr(transformer, "peft_config", {}) if name not in experts]


def normalised_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA's weights under names that diffusers' Wan loader understands.

    It knows "transformer.blocks.0.attn1.to_q.lora_A.weight" (diffusers) and, with the prefix "diffusion_model.", the
    names of the original model, "blocks.0.self_attn.q.lora_down.weight" (ComfyUI). Trainers of the original model
    write them without that prefix or with the adapter's name ("lora_A.default.weight", DiffSynth-Studio), and
    `save_lora_adapter` writes diffusers' names without theirs.
    """
    named = {}
    for key, tensor in state_dict.items():
        if not key.startswith(("transformer.", "diffusion_model.", "lora_unet_")):
            key = _ADAPTER.sub(r".\1.weight", _WRAPPER.sub("", key))
            original = re.search(
                r"\.(self_attn|cross_attn)\.|\.ffn\.\d\.|^head\.|_embedding\.|_projection\.", key
            )
            key = f"{'diffusion_model' if original else 'transformer'}.{key}"
        named[key] = tensor
    return named


def lora_name(source: str | Path | Mapping[str, Tensor]) -> str:
    """What a LoRA is called in messages."""
    return "weights" if isinstance(source, Mapping) else str(source)


def read_lora(
    loader: Any, source: str | Path | Mapping[str, Tensor], **kwargs: Any
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """A LoRA's weights in diffusers' names, and what diffusers wrote about it.

    Args:
        loader: a pipeline class of diffusers for Wan.
        source: a file, a folder, a hub id or the weights, which stay as they are.
        kwargs: of diffusers' `lora_state_dict`.

    Raises:
        ValueError: for something else than a LoRA that diffusers can convert.
    """
    # Cloned: the conversion multiplies some of them by alpha / rank in place.
    given = (
        {key: tensor.clone() for key, tensor in normalised_keys(source).items()}
        if isinstance(source, Mapping)
        else str(source)
    )
    try:
        found, metadata = loader.lora_state_dict(given, return_lora_metadata=True, **kwargs)
        found = loader.lora_state_dict(normalised_keys(found))
    except (LookupError, ValueError) as error:
        raise ValueError(
            f"LoRA {lora_name(source)}: diffusers cannot convert it: {type(error).__name__} {error}"
        ) from error
    if metadata is not None:  # `save_lora_adapter` writes it without the prefix by which it is looked for
        metadata = {
            f"transformer.{key.removeprefix('transformer.')}": value for key, value in metadata.items()
        }
    return found, metadata


def check_lora(transformer: WanTransformer3DModel, state_dict: Mapping[str, Any], source: str) -> None:
    """Refuse a LoRA that does not fit, of which diffusers would load a part with a warning, or nothing.

    Args:
        transformer: without experts' layers, see `experts_set_aside`.
        state_dict: in diffusers' names.
        source: for the message.

    Raises:
        ValueError: when a layer is not in the transformer or has another width.
    """
    layers = {
        key.removeprefix("transformer.").rsplit(".lora_", 1)[0]: key for key in state_dict if ".lora_" in key
    }
    if not layers:
        raise ValueError(f"LoRA {source}: holds no weights of a LoRA for Wan's transformer")
    modules = dict(transformer.named_modules())
    unknown = sorted(name for name in layers if name not in modules)
    if unknown:
        raise ValueError(
            f"LoRA {source}: {len(unknown)} of its {len(layers)} layers are not in this transformer of "
            f"{len(transformer.blocks)} blocks, for instance {unknown[0]}"
        )
    for name in layers:
        for part, attribute, axis in (("lora_A", "in_features", 1), ("lora_B", "out_features", 0)):
            weight = state_dict.get(f"transformer.{name}.{part}.weight")
            expected = getattr(modules[name], attribute, None)
            if weight is not None and expected is not None and weight.shape[axis] != expected:
                raise ValueError(
                    f"LoRA {source}: {name}.{part} has shape {tuple(weight.shape)}, the transformer's layer has "
                    f"{attribute} {expected}"
                )
