"""Which attentions a computation runs."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class AttentionCalls(TorchDispatchMode):
    """Numbers of keys of the attentions computed."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__
        if ("scaled_dot_product" in name or "block_attention" in name) and "backward" not in name:
            self.keys.append(args[1].shape[-2])
        return function(*args, **(kwargs or {}))
