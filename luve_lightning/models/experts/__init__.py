"""The frequency experts: named PEFT adapters in one transformer, chosen per sample by noise level.

With torch.compile, each choice of experts and each token grid is a graph of its own, and torch gives up after
`torch._dynamo.config.recompile_limit` (8) of them: train on few sizes or raise the limit. With gradient
checkpointing, compile the blocks (`transformer.compile_repeated_blocks()`), not the whole transformer.

On disk an expert is PEFT's two files, and one beside them for what PEFT's do not say.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from luve_lightning.files import read_json
from luve_lightning.functional.frequency import FrequencyFilter
from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.model_folders import saving
from luve_lightning.models.attention import Attention
from luve_lightning.models.attention.dense import Dense
from luve_lightning.models.backbones import Denoiser, denoiser_of
from luve_lightning.models.experts.layer import (
    add_expert,
    check_can_take,
    expert_layers,
    expert_parameters,
    experts_set_aside,
    inject,
    lora_config,
    site_names,
    train_only,
    unwrapped,
)
from luve_lightning.models.experts.routing import (
    ExpertConfig,
    activate,
    choice_kept,
    expert_names,
    route_by_sigma,
    state_of,
)

__all__ = [
    "ExpertConfig",
    "activate",
    "add_expert",
    "choice_kept",
    "expert_names",
    "expert_parameters",
    "experts_set_aside",
    "load_expert",
    "route_by_sigma",
    "save_expert",
    "train_only",
]


ADAPTER_CONFIG, ADAPTER_WEIGHTS, EXPERT = "adapter_config.json", "adapter_model.safetensors", "expert.json"
FORMAT = 1
# PEFT settings that would change the meaning of the weights, with their values when unused.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
}


def save_expert(transformer: Any, name: str, folder: str | Path) -> None:
    """Write an expert as PEFT's `adapter_config.json` and `adapter_model.safetensors`, and `expert.json`.

    They replace an older expert atomically. Where the parameters are sharded (FSDP2) every rank must call it, and
    rank 0 writes.

    Raises:
        ValueError: for an unknown expert.
    """
    config, denoiser = state_of(transformer, name).configs[name], denoiser_of(transformer)
    weights = _weights(denoiser, name, config)
    if weights is None:
        return
    facts: dict[str, Any] = {
        "format": FORMAT,
        "name": name,
        "place": list(config.places),
        "filter": None if config.filter is None else asdict(config.filter),
        "band": asdict(config.band),
    }
    if (attention := denoiser.attention_in_force) != Dense():
        facts["attention"] = attention.record()
    with saving(folder) as new:
        lora_config(denoiser, config, inference_mode=True).save_pretrained(new)
        safetensors.torch.save_file(weights, new / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (new / EXPERT).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def load_expert(transformer: Any, folder: str | Path, name: str | None = None, any_attention: bool = False) -> str:
    """The name of a saved expert, added bit for bit. It is then active and frozen; other experts stay.

    Args:
        transformer: see `add_expert`; as wide and deep as the one the expert was trained on.
        folder: folder that `save_expert` wrote.
        name: new name; default its saved name.
        any_attention: load it even if it was trained with another attention than the transformer's.

    Raises:
        FileNotFoundError: when one of the three files is missing.
        ValueError: for other files or another transformer, which is left unchanged.
    """
    folder = Path(folder)
    for file in (EXPERT, ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"no expert in {folder}: {file} is missing")
    saved_name, config, targets = _read_config(folder)
    name = name or saved_name
    check_can_take(transformer, name)
    denoiser = denoiser_of(transformer)
    if not any_attention:
        _check_attention(denoiser, folder / EXPERT)
    if targets != set(sites := site_names(denoiser, config)):
        raise ValueError(f"{folder}: {ADAPTER_CONFIG} is for modules {sorted(targets)}, {EXPERT} for {sites}")
    try:
        weights = safetensors.torch.load_file(folder / ADAPTER_WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / ADAPTER_WEIGHTS}: not a safetensors file: {error}") from error
    _check_weights(denoiser, config, weights, folder)
    layers = inject(transformer, name, config, dtype=next(iter(weights.values())).dtype)
    with torch.no_grad():
        for layer_name, layer in layers.items():
            for part in ("lora_A", "lora_B"):
                getattr(layer, part)[name].weight.copy_(weights[_key(layer_name, part)])
    return name


def describe_expert(folder: str | Path) -> dict[str, Any]:
    """What a saved expert is, by its two JSON files, in words for people; its weights are not looked at.

    Raises:
        FileNotFoundError: when one of the two is missing.
        ValueError: when they do not describe an expert.
    """
    name, config, targets = _read_config(Path(folder))
    kept, record = config.filter, read_json(Path(folder) / EXPERT).get("attention")
    return {
        "name": name,
        "place": list(config.places),
        "modules": sorted(targets),
        "rank": config.rank,
        "scale": f"{config.alpha / config.rank:g} (alpha {config.alpha:g})",
        "filter": "none"
        if kept is None
        else f"{kept.band}-pass, cutoff {kept.cutoff:g} of Nyquist, {kept.window}, along {' '.join(kept.axes)}",
        "band": f"sigma {config.band.low:g} to {config.band.high:g}",
        "attention": str(Dense() if record is None else Attention.from_record(record)),
    }


def _key(layer: str, part: str) -> str:
    return f"base_model.model.{layer}.{part}.weight"  # as a PeftModel writes it


def _weights(denoiser: Denoiser, name: str, config: ExpertConfig) -> dict[str, Tensor] | None:
    """An expert's weights on the CPU by their names in the file; None on a rank that must not write."""
    weights = {}
    writes = True
    for layer_name, layer in expert_layers(denoiser, config).items():
        for part in ("lora_A", "lora_B"):
            weight = getattr(layer, part)[name].weight.detach()
            if isinstance(weight, DTensor):
                writes = dist.get_rank() == 0
                weight = weight.full_tensor()
            weights[_key(layer_name, part)] = weight.cpu().contiguous()
    return weights if writes else None


def _read_config(folder: Path) -> tuple[str, ExpertConfig, set[str]]:
    """Name and configuration of a saved expert, and the modules that PEFT's file names."""
    facts, lora = (read_json(folder / file) for file in (EXPERT, ADAPTER_CONFIG))
    if facts.get("format") != FORMAT:
        raise ValueError(f"{folder / EXPERT}: format {facts.get('format')!r}, expected {FORMAT}")
    for key, values in _UNUSED.items():
        if lora.get(key) not in values:
            raise ValueError(f"{folder / ADAPTER_CONFIG}: {key} is {lora[key]!r}, which an expert cannot have")
    try:
        config = ExpertConfig(
            place=tuple(facts["place"]) if len(facts["place"]) > 1 else facts["place"][0],
            rank=lora["r"],
            alpha=lora["lora_alpha"],
            filter=None if facts["filter"] is None else FrequencyFilter(**facts["filter"]),
            band=SigmaBand(**facts["band"]),
        )
        name, targets = str(facts["name"]), set(lora["target_modules"])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{folder}: {EXPERT} or {ADAPTER_CONFIG} lacks or misnames {error}") from error
    except ValueError as error:  # a number out of range
        raise ValueError(f"{folder}: {EXPERT} or {ADAPTER_CONFIG}: {error}") from error
    return name, config, targets


def _check_attention(denoiser: Denoiser, file: Path) -> None:
    """Check that an expert's attention, dense where its file names none, is the transformer's."""
    record = read_json(file).get("attention")
    try:
        trained = Dense() if record is None else Attention.from_record(record)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    if trained != (own := denoiser.attention_in_force):
        raise ValueError(
            f"{file}: the expert was trained with the attention {trained}, the transformer has {own}: load it on a "
            "transformer adapted with its own, or ask for an attention by name (`attention`)"
        )


def _check_weights(denoiser: Denoiser, config: ExpertConfig, weights: dict[str, Tensor], folder: Path) -> None:
    """Check that the weights are exactly those this transformer needs, with its shapes, all of one float dtype."""
    needed: dict[str, tuple[int, ...]] = {}
    for layer_name, site in expert_layers(denoiser, config).items():
        width_in, width_out = denoiser.widths(unwrapped(site))
        needed[_key(layer_name, "lora_A")] = (config.rank, width_in)
        needed[_key(layer_name, "lora_B")] = (width_out, config.rank)
    where = f"{folder / ADAPTER_WEIGHTS} does not fit this transformer"
    if set(weights) != set(needed):
        missing, extra = sorted(set(needed) - set(weights)), sorted(set(weights) - set(needed))
        example = f"{missing[0]} is missing" if missing else f"{extra[0]} is too many"
        raise ValueError(f"{where} ({len(denoiser.blocks)} blocks): {example}")
    for key, shape in needed.items():
        if tuple(weights[key].shape) != shape:
            raise ValueError(f"{where}: {key} has shape {tuple(weights[key].shape)}, expected {shape}")
    if len({w.dtype for w in weights.values()}) > 1 or not next(iter(weights.values())).is_floating_point():
        raise ValueError(f"{folder / ADAPTER_WEIGHTS}: expected weights of one floating-point dtype")
    for key, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f"{folder / ADAPTER_WEIGHTS}: {key} holds values that are not numbers")
