"""Where in a model a computation is."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class ModulePlaces:
    """While it is entered: which module runs, as its path in the outermost one, without indices."""

    def __init__(self) -> None:
        self.stack: list[str] = []
        self._names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._hooks: list[Any] = []

    def __enter__(self) -> ModulePlaces:
        self._hooks = [
            register_module_forward_pre_hook(self._begin),
            register_module_forward_hook(self._end, always_call=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def current(self) -> str:
        """The innermost module that runs."""
        return self.stack[-1] if self.stack else "outside modules"

    def _begin(self, module: nn.Module, _: Any) -> None:
        if module not in self._names:
            for name, child in module.named_modules():
                path = [type(module).__name__, *(part for part in name.split(".") if not part.isdigit())]
                self._names.setdefault(child, ".".join(part for part in path if part))
        self.stack.append(self._names[module])

    def _end(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self.stack.pop()
