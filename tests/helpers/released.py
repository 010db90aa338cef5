"""The released VLUer with weights made by a rule, as a file and as a model, and a small network of the same form."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luve_lightning.models.vluer import ReleasedVLUer
from luve_lightning.models.vluer.released import buffer_names

# Outputs of the released network itself with these weights, float32 on a CPU; see `ruled`.
REFERENCE = Path(__file__).parents[1] / "models" / "vluer" / "released_vluer"
SMALL: dict[str, Any] = {
    "heads": 2, "channels": 12, "deep_channels": 18, "mutual_blocks": 2, "self_blocks": 1, "deep_groups": 2,
    "deep_blocks": 2, "frame_groups": 1, "hidden": (9, 7), "decoder_channels": 12,
    "decoder_deep_channels": 12, "decoder_groups": 1,
}  # fmt: skip


@cache
def reference() -> dict[str, Any]:
    """`parameters` and `buffers` by name with their shapes, and `cases`."""
    content: dict[str, Any] = json.loads(REFERENCE.with_suffix(".json").read_text())
    return content


def ruled(name: str, shape: tuple[int, ...]) -> Tensor:
    """The values of a parameter, by its name: those that the reference outputs were computed with."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal(math.prod(shape)).astype(np.float32)).view(shape)
    if name.endswith("relative_position_bias_table"):
        return 0.5 * x
    if "norm" in name.split(".")[-2] or ".reshape.1." in name or ".stage8.0.1." in name:
        return 1 + 0.2 * x if name.endswith("weight") else 0.1 * x
    return 0.1 * x if name.endswith("bias") else x / math.sqrt(math.prod(shape[1:]))


def rule_weights(net: nn.Module) -> nn.Module:
    """Give a network the rule's weights, in place."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(ruled(name, tuple(parameter.shape)))
    return net


def small_released(**changes: Any) -> ReleasedVLUer:
    """A small network with the rule's weights."""
    net = ReleasedVLUer(**(SMALL | changes)).eval()
    rule_weights(net)
    return net


def released_content(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The released file's content around a state, with an optimiser that has run."""
    names = [name for name in state if name in reference()["parameters"]]
    adam = {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    groups = [{"lr": 2e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "params": list(range(len(names)))}]
    return {
        "model": {"name": "vluer", "args": {"encoder_spec": {"name": "vrt"}, "scale": None}, "sd": dict(state)},
        "optimizer": {"name": "adam", "args": {"lr": 2e-4}, "sd": {"state": {0: adam}, "param_groups": groups}},
        "lr_scheduler": {"T_max": 400_000, "last_epoch": 7, "_last_lr": [2e-4]},
        "iter": 7,
    }


def released_state(net: ReleasedVLUer) -> dict[str, Tensor]:
    """Parameters and buffers as the released state has them."""
    state = dict(net.state_dict())
    for name, (group, buffer) in buffer_names(net).items():
        value = getattr(group, buffer)
        state[name] = value if buffer == "index" else value.flatten(0, 1)[None]
    return state
