"""Wan's weights in single files, as its authors, ComfyUI and DiffSynth-Studio publish and save them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors import safe_open
from torch import Tensor

from luve_lightning.files import read_json
from luve_lightning.model_folders import KnownWeights, WeightsHeader, not_finite, shards_of
from luve_lightning.terminal import amount

FAMILY = "wan"
ORIGINAL_CLASS = "WanModel"
"""Class name in the `config.json` of Wan's own folders."""
HEAD_WIDTH = 128
"""Channels of an attention head of every published Wan."""

# Modules around the transformer in others' code: ComfyUI, DiffSynth-Studio, DDP, PEFT.
_WRAPPERS = r"(?:(?:model|diffusion_model|pipe|dit|transformer|module|base_model)\.)*"
_COMPILED = "_orig_mod."  # torch.compile puts it before any module's name
# A part is known by one of these names.
_MARKS = (
    ("transformer", "original", re.compile(rf"({_WRAPPERS})blocks\.\d+\.self_attn\.q\.weight")),
    ("transformer", "diffusers", re.compile(rf"({_WRAPPERS})blocks\.\d+\.attn1\.to_q\.weight")),
    ("vae", "original", re.compile(r"((?:vae\.|first_stage_model\.)?)decoder\.middle\.0\.residual\.0\.gamma")),
    ("vae", "diffusers", re.compile(r"((?:vae\.)?)decoder\.mid_block\.resnets\.0\.norm1\.gamma")),
    ("text_encoder", "original", re.compile(r"((?:text_encoder\.)?)blocks\.0\.ffn\.gate\.0\.weight")),
    ("text_encoder", "transformers", re.compile(r"(.*?)encoder\.block\.0\.layer\.1\.DenseReluDense\.wi_0\.weight")),
)
# Wan's other models, by modules that only they have.
_OTHERS = {
    "vace_blocks.": "VACE",
    "motion_encoder.": "Wan-Animate",
    "face_adapter.": "Wan-Animate",
    "audio_injector.": "Wan-S2V",
    "control_adapter.": "camera control",
    "ref_conv.": "control",
    "img_emb.": "image to video",
    "condition_embedder.image_embedder.": "image to video",
}
_ALIGNMENT = 64  # bytes, as PyTorch allocates
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# What scales quantised weights, in ComfyUI's files and others'.
_SCALE = re.compile(
    r"(.*\.)?(scaled_fp8|scale_weight|weight_scale|scale_input|input_scale|weight_scale_inv|comfy_quant)"
)
# Sizes by their names in diffusers' configuration and in Wan's own.
_SIZES = (("num_layers", "num_layers"), ("ffn_dim", "ffn_dim"), ("freq_dim", "freq_dim"), ("text_dim", "text_dim"),
          ("in_channels", "in_dim"), ("out_channels", "out_dim"))  # fmt: skip
# What shapes do not tell, and its type.
_KEPT: dict[str, type | UnionType] = {"eps": int | float, "rope_max_seq_len": int, "luve_attention": dict}


def wan_weights(header: WeightsHeader) -> KnownWeights | None:
    """What a file holds of Wan; see `Backbone.recognise`."""
    for part, layout, mark in _MARKS:
        found = next((f for name in header.shapes if (f := mark.fullmatch(name.replace(_COMPILED, "")))), None)
        if found is None:
            continue
        if part == "transformer":
            return _transformer(header, layout, found[1])
        what = "Wan's VAE" if part == "vae" else "a T5 text encoder"
        refusal = f"holds {what}, which is taken from {part}/ of a diffusers pipeline folder"
        return KnownWeights(FAMILY, part, layout, found[1], {}, {}, refusal)
    return None


def single_file(path: str | Path) -> Path | None:
    """The weights file that a path stands for: itself, or that in a folder of Wan's own layout; None for others.

    Raises:
        ValueError: when such a folder does not hold exactly one transformer.
    """
    folder = Path(path)
    if folder.is_file():
        return folder
    config = folder / "config.json"
    if not config.is_file() or read_json(config).get("_class_name") != ORIGINAL_CLASS:
        return None
    files = sorted(folder.glob("*.safetensors"))
    standing = {shards_of(file): file for file in files}
    if len(standing) != 1:
        found = ", ".join(file.name for file in standing.values()) or "none"
        raise ValueError(f"{folder}: expected one file of weights or its shards (.safetensors), found {found}")
    return files[0]


def load_transformer(header: WeightsHeader, known: KnownWeights, dtype: torch.dtype) -> WanTransformer3DModel:
    """The transformer in a file, as diffusers' `from_pretrained` gives it from a folder of the same weights.

    Tensors are read one by one from the mapped file. Those that have the dtype already stay there, unless their
    address is an odd one: then CPU kernels add up in another order, and the last bits would depend on the file's
    header.

    Args:
        header: the file's.
        known: what `wan_weights` says of it.
        dtype: dtype of the weights; diffusers keeps norms and the time embedding in float32.

    Raises:
        ValueError: when it is refused.
    """
    if known.refusal is not None:
        raise ValueError(f"{header.path}: {known.refusal}")
    with init_empty_weights():
        model = WanTransformer3DModel(**{k: v for k, v in known.sizes.items() if k != "luve_attention"})
    if "luve_attention" in known.sizes:
        model.register_to_config(luve_attention=known.sizes["luve_attention"])
    model.register_to_config(_name_or_path=str(header.path))
    names = {theirs: ours for ours, theirs in known.names.items()}
    wide, weights = set(WanTransformer3DModel._keep_in_fp32_modules), dict[str, Tensor]()
    for file in header.files:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118  # no mapping: it has no iterator
                ours = names[name]
                kept = wide.intersection(ours.split("."))
                weight = content.get_tensor(name).to(torch.float32 if kept else dtype)
                weights[ours] = weight.clone() if weight.data_ptr() % _ALIGNMENT else weight
    model.load_state_dict(weights, assign=True)
    if odd := not_finite(model):
        raise ValueError(
            f"{header.path}: {amount(len(odd), 'weight')} with values that are not finite, for instance {odd[0]}"
        )
    loaded: WanTransformer3DModel = model.eval()
    return loaded


def _transformer(header: WeightsHeader, layout: str, prefix: str) -> KnownWeights:
    names: dict[str, str] = {}
    foreign = []
    for name in header.shapes:
        bare = name.replace(_COMPILED, "")
        if not bare.startswith(prefix) or (ours := _diffusers_name(bare[len(prefix) :], layout)) in names:
            foreign.append(name)
        else:
            names[ours] = name
    sizes, refusal = {}, _other(header, prefix)
    config, where = _configuration(header)
    if refusal is None:
        try:
            sizes = _sizes(header, names, config, where)
            _check(header, names, foreign, sizes)
        except ValueError as error:
            refusal = str(error)
    used = where if config and isinstance(where, Path) else None
    return KnownWeights(FAMILY, "transformer", layout, prefix, sizes, names, refusal, used)


def _diffusers_name(name: str, layout: str) -> str:
    if layout == "diffusers" or name.startswith(tuple(_OTHERS)):
        return name
    (ours,) = convert_wan_transformer_to_diffusers({name: None})
    return str(ours)


def _other(header: WeightsHeader, prefix: str) -> str | None:
    """Why a transformer is none that is taken, as far as names and dtypes tell."""
    for start, kind in _OTHERS.items():
        if any(name.replace(_COMPILED, "").startswith(prefix + start) for name in header.shapes):
            return f"holds a Wan transformer for another task ({kind}); expected one for text to video"
    if scale := next(filter(_SCALE.fullmatch, header.shapes), None):
        return (
            f"holds quantised weights with scales beside them, for instance {scale}; expected the file in float32, "
            "float16, bfloat16 or plain float8"
        )
    for name, dtype in header.dtypes.items():
        if dtype not in _FLOATS:
            return f"holds weights in {dtype}, for instance {name}; expected float32, float16, bfloat16 or plain float8"
    return None


def _sizes(
    header: WeightsHeader, names: Mapping[str, str], config: dict[str, Any], where: str | Path
) -> dict[str, Any]:
    """Arguments of diffusers' class, by the tensors' shapes and what a configuration says, which is from `where`."""

    def shape(name: str, axes: int = 2) -> tuple[int, ...]:
        if name not in names:
            raise ValueError(f"holds a part of a Wan transformer only: {name} (as diffusers names it) is missing")
        if len(found := header.shapes[names[name]]) != axes:
            raise ValueError(f"{names[name]} has shape {found}, expected {axes} axes")
        return found

    width, in_channels, *patch = shape("patch_embedding.weight", 5)
    embedder = "condition_embedder."
    sizes = {
        "patch_size": tuple(patch),
        "in_channels": in_channels,
        "out_channels": shape("proj_out.weight")[0] // math.prod(patch),
        "text_dim": shape(f"{embedder}text_embedder.linear_1.weight")[1],
        "freq_dim": shape(f"{embedder}time_embedder.linear_1.weight")[1],
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight")[0],
        "num_layers": 1 + max(int(name.split(".")[1]) for name in names if re.match(r"blocks\.\d+\.", name)),
        "cross_attn_norm": "blocks.0.norm2.weight" in names,
    }
    for ours, theirs in _SIZES:
        given = config.get(ours, config.get(theirs))
        if given is not None and given != sizes[ours]:
            raise ValueError(f"{where} says {ours} {given}, but the weights' shapes say {sizes[ours]}")
    heads = config.get("num_attention_heads", config.get("num_heads", width // HEAD_WIDTH))
    if not isinstance(heads, int) or heads < 1 or width % heads or (not config and width % HEAD_WIDTH):
        given = f"the {heads} heads in {where}" if config else f"heads of {HEAD_WIDTH}"
        raise ValueError(
            f"has width {width}, which is no multiple of {given}; another head width belongs in a config.json beside "
            "the file"
        )
    given = config.get("attention_head_dim", width // heads)
    if given != width // heads or config.get("dim", width) != width:
        raise ValueError(f"{where} says another width than the weights' shapes, {width}")
    sizes |= {"num_attention_heads": heads, "attention_head_dim": width // heads}
    kept = {key: config[key] for key in _KEPT if config.get(key) is not None}
    if odd := next((key for key, value in kept.items() if not isinstance(value, _KEPT[key])), None):
        raise ValueError(f"{where} says {odd} {kept[odd]!r}: no value of a Wan transformer's")
    sizes |= kept
    if in_channels != sizes["out_channels"]:
        raise ValueError(
            f"holds a Wan transformer that takes {in_channels} latent channels and gives {sizes['out_channels']}, as "
            "for image to video; expected one for text to video"
        )
    return sizes


def _configuration(header: WeightsHeader) -> tuple[dict[str, Any], str | Path]:
    """The configuration in a file's header, or that of a Wan in the `config.json` beside it; and where it is."""
    where: str | Path = header.path.parent / "config.json"
    if (text := header.metadata.get("config")) is not None:
        where = "the configuration in its header"
    try:
        config = json.loads(where.read_text(encoding="utf-8") if isinstance(where, Path) else str(text))
    except (OSError, ValueError, RecursionError):
        return {}, where
    known = (ORIGINAL_CLASS, WanTransformer3DModel.__name__)
    return config if isinstance(config, dict) and config.get("_class_name") in known else {}, where


def _check(header: WeightsHeader, names: Mapping[str, str], foreign: list[str], sizes: Mapping[str, Any]) -> None:
    """Refuse weights that are missing, not the transformer's, or of other shapes."""
    with torch.device("meta"):
        model = WanTransformer3DModel(**{k: v for k, v in sizes.items() if k != "luve_attention"})
    wanted = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    missing = sorted(wanted.keys() - names.keys())
    foreign = sorted([*foreign, *(names[name] for name in names.keys() - wanted.keys())])
    odd = sorted(n for n in wanted.keys() & names.keys() if wanted[n] != header.shapes[names[n]])
    if missing:
        raise ValueError(f"{amount(len(missing), 'weight')} missing, for instance {missing[0]} (as diffusers names it)")
    if foreign:
        raise ValueError(f"{amount(len(foreign), 'weight')} not those of a Wan transformer, for instance {foreign[0]}")
    if odd:
        name = names[odd[0]]
        raise ValueError(
            f"{amount(len(odd), 'weight')} of another shape than the others imply, for instance {name}: expected "
            f"{wanted[odd[0]]}, got {header.shapes[name]}"
        )
