"""Wan's transformer in files of one piece, as its authors and ComfyUI name its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

# Names of diffusers and of Wan's own code (wan/modules/model.py of Wan2.1), written without diffusers' conversion.
_OWN = (
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^proj_out\.", "head.head."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"\.scale_shift_table$", ".modulation"),
    (r"\.norm2\.", ".norm3."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
)


def own_name(name: str) -> str:
    """A weight's name in Wan's own code."""
    for ours, theirs in _OWN:
        name = re.sub(ours, theirs, name)
    return name


def own_weights(transformer: nn.Module, prefix: str = "", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A transformer's weights under Wan's own names and a prefix."""
    weights: Mapping[str, Tensor] = transformer.state_dict()
    return {prefix + own_name(name): x.to(dtype or x.dtype).contiguous() for name, x in weights.items()}


def own_config(transformer: Any) -> dict[str, Any]:
    """The `config.json` of Wan's own folders."""
    config = transformer.config
    heads = config.num_attention_heads
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": heads * config.attention_head_dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "model_type": "t2v",
        "num_heads": heads,
        "num_layers": config.num_layers,
        "out_dim": config.out_channels,
        "text_len": 512,
    }


def write_weights(path: Path, weights: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write a file of weights; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights), path, metadata)
    return path
