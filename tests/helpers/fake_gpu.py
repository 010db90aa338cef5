"""A GPU without values: on a CPU, it shows what would be mixed from two devices."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

GPU = torch.device("cuda", 0)
_Module = TypeVar("_Module", bound=nn.Module)


def on_gpu(module: _Module) -> _Module:
    """The module with its parameters and buffers on the fake GPU, in place; to be called in a FakeTensorMode.

    There, tensors have a shape and a device alone, and operations refuse tensors of two devices or from outside.
    """
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            held: dict[str, Any] = tensors
            held |= {name: _moved(tensor) for name, tensor in tensors.items() if tensor is not None}
    return module


def _moved(tensor: Tensor) -> Tensor:
    moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=GPU)
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
