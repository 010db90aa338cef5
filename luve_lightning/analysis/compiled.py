"""What torch.compile leaves of a module's element-wise operations: bytes moved, and bytes in memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class ModulePlaces:
    """While entered: the running module, as its path in the outermost one, without indices.

    Args:
        compiled: see `dry_run`.
    """

    def __init__(self, compiled: Collection[nn.Module] = ()) -> None:
        self.stack: list[str] = []
        self.depth = 0  # of running compiled modules
        self.left: Callable[[Any], None] = lambda output: None  # called with what the outermost of them returns
        self._compiled = frozenset(compiled)
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
        """The innermost running module."""
        return self.stack[-1] if self.stack else "outside modules"

    def _begin(self, module: nn.Module, _: Any) -> None:
        if module not in self._names:
            for name, child in module.named_modules():
                path = [type(module).__name__, *(part for part in name.split(".") if not part.isdigit())]
                self._names.setdefault(child, ".".join(part for part in path if part))
        self.stack.append(self._names[module])
        self.depth += module in self._compiled

    def _end(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        self.stack.pop()
        if module in self._compiled:
            self.depth -= 1
            if not self.depth:
                self.left(output)


class UnwrittenResults:
    """Results of compiled element-wise operations, each of which a kernel that reads it computes from its sources.

    A result has memory once another kind of kernel reads it or it leaves the compiled module, and when a source that
    has memory is freed, in whose place it is written. Autograd keeps its sources instead.

    Args:
        count: called with a storage and 1 when it is written, and -1 when it is not, or no longer kept.
    """

    def __init__(self, count: Callable[[int, int], None]) -> None:
        self.count = count
        self.counted_out: set[int] = set()
        self._sources: dict[int, set[int]] = {}
        self._results: dict[int, set[int]] = {}

    def add(self, key: int, sources: Collection[int]) -> None:
        """A new result, not yet written."""
        if not sources:  # of nothing but a shape
            return
        self._join(key, sources)
        self.counted_out.add(key)
        self.count(key, -1)

    def read(self, keys: Iterable[int], keep: bool) -> None:
        """Another kernel reads some; `keep`: they stay in memory as long as they live."""
        for key in keys:
            if key in self.counted_out:
                self.counted_out.remove(key)
                self.count(key, 1)
            if keep:
                self._settle(key)

    def forget_values(self) -> None:
        """What was written is not kept for the backward pass, which computes it again."""
        for key in self._sources.keys() - self.counted_out:
            self.counted_out.add(key)
            self.count(key, -1)

    def freed(self, key: int) -> bool:
        """A storage is freed; whether it had memory."""
        sources, results = self._settle(key), self._results.pop(key, set())
        for result in results:
            self._sources[result].discard(key)
            if sources:  # from which its results can be computed, too
                self._join(result, sources)
        if not sources:
            self.read(results, keep=True)
        written = key not in self.counted_out
        self.counted_out.discard(key)
        return written

    def _join(self, key: int, sources: Collection[int]) -> None:
        self._sources.setdefault(key, set()).update(sources)
        for source in sources:
            self._results.setdefault(source, set()).add(key)

    def _settle(self, key: int) -> set[int]:
        """Forget a result's sources; returns them."""
        sources = self._sources.pop(key, set())
        for source in sources:
            self._results[source].discard(key)
        return sources


class FusedTraffic:
    """Bytes that compiled operations read and write, of which those between two kernels of another kind are one."""

    def __init__(self) -> None:
        self._region = 0
        self._read: set[int] = set()
        self._unwritten: dict[int, tuple[int, int]] = {}  # region and bytes of what may never have to be written

    def inside(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        """Bytes of one more operation of the current region."""
        moved = 0
        for tensor in inputs:
            key = tensor.untyped_storage()._cdata
            region, written = self._unwritten.get(key, (-1, 0))
            if region == self._region or key in self._read:
                continue
            self._read.add(key)
            self._unwritten.pop(key, None)
            moved += written + touched_bytes(tensor)
        for tensor in outputs:
            self._unwritten[tensor.untyped_storage()._cdata] = self._region, touched_bytes(tensor)
        return moved

    def outside(self, inputs: Sequence[Tensor]) -> int:
        """Bytes that regions write for another kernel, which also ends the current one."""
        self._region += 1
        self._read.clear()
        return sum(self._unwritten.pop(t.untyped_storage()._cdata, (0, 0))[1] for t in inputs)

    def forget(self, key: int) -> None:
        """Forget a freed storage."""
        self._unwritten.pop(key, None)
        self._read.discard(key)


def touched_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor that an operation reads or writes; expanded values are read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
