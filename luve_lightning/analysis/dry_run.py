"""Counting an operation's work and memory without running it on a GPU."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count


class ModulePlaces:
    """While entered: the running module, as its path in the outermost one, without indices.

    Args:
        compiled: see `dry_run`.
    """

    def __init__(self, compiled: Collection[nn.Module] = ()) -> None:
        self.stack: list[str] = []
        self.depth = 0  # of running compiled modules
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

    def _end(self, module: nn.Module, _inputs: Any, _output: Any) -> None:
        self.stack.pop()
        self.depth -= module in self._compiled


OperationKind = Literal[
    "attention", "wide attention", "block-sparse attention", "matmul", "convolution", "converted convolution", "rest"
]

BLOCK = 512  # PyTorch's CUDA allocator rounds up to this many bytes
CUBLAS_WORKSPACE = 32 * 2**20
_ALLOCATIONS = frozenset(
    getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty")
)
# Compilers fuse no kernel across these: what they read lies elsewhere.
_UNFUSED = frozenset(getattr(torch.ops.aten, name) for name in ("index", "index_select", "gather", "embedding"))
WIDE_HEAD = 256  # no flash kernel takes wider heads


@dataclass(frozen=True)
class Operation:
    """One operation's work.

    Attributes:
        kind: what executes it; "wide attention" has heads that no flash kernel takes, "block-sparse attention" is a
            kernel that skips pairs, "converted convolution" is not channels last.
        flops: floating-point operations, a multiply-add counted as two; 0 for "rest".
        bytes: bytes read and written.
        dtype: dtype of its result.
        keys: keys of each query in "attention", else 0.
    """

    kind: OperationKind
    flops: int
    bytes: int
    dtype: torch.dtype
    keys: int = 0


@dataclass
class DryRun:
    """The cost of a computation.

    Attributes:
        peak: bytes at the highest point allocated by the computation itself, without weights and earlier tensors.
        operations: how often each ran.
        terms: what made the bytes at the peak, as module paths without indices.
    """

    peak: int = 0
    operations: Counter[Operation] = field(default_factory=Counter)
    terms: dict[str, int] = field(default_factory=dict)
    in_attention: bool = False  # while a CountedAttention runs
    _weight: int = 1

    @contextmanager
    def times(self, count: int) -> Iterator[None]:
        """Multiply the operations run in this context: identical repetitions need running only once."""
        before, self._weight = self._weight, count
        yield
        self._weight = before

    def add(self, kind: OperationKind, flops: int, moved: int, dtype: torch.dtype, keys: int = 0) -> None:
        """Record one operation."""
        self.operations[Operation(kind, flops, moved, dtype, keys)] += self._weight

    @property
    def flops(self) -> int:
        """Total floating-point operations."""
        return sum(operation.flops * count for operation, count in self.operations.items())

    @property
    def attended(self) -> int:
        """Floating-point operations of attention."""
        return sum(done.flops * count for done, count in self.operations.items() if done.kind.endswith("attention"))


@contextmanager
def dry_run(*, fused: bool = True, converts: bool = True, compiled: Collection[nn.Module] = ()) -> Iterator[DryRun]:
    """Count what runs in this context, without gradients.

    Args:
        fused: count as a GPU runs it: attention and RMS norm are one operation each, and what is computed on the
            CPU counts nothing. False leaves all to the tensors' device.
        converts: convolutions need copies in another layout, see above.
        compiled: modules that torch.compile compiles. There, operations between two matrix products or attentions
            read and write only what is there before them and used after them. Memory is counted as without it.

    Yields:
        The counts, complete when the context ends.
    """
    run = DryRun()
    with torch.no_grad(), ModulePlaces(compiled) as places:
        watch = _Watch(run, places, fused, converts)
        with watch, _Fused(watch, fused):
            yield run
        watch.stop()


@contextmanager
def dry_training(functions: TorchFunctionMode, compiled: Collection[nn.Module] = ()) -> Iterator[DryRun]:
    """Count what runs in this context on the meta device with gradients, the backward pass too; see `dry_run`.

    Args:
        functions: replaces what a GPU runs otherwise, attention first of all.
        compiled: see `dry_run`.

    Yields:
        The counts, complete when the context ends. Gradients are part of the peak.
    """
    run = DryRun()
    with torch.enable_grad(), ModulePlaces(compiled) as places:
        watch = _Watch(run, places, fused=True, converts=True)
        with watch, functions:
            yield run
        watch.stop()


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, rounded as the allocator rounds; tied weights count once."""
    storages = [tensor.untyped_storage() for tensor in (*module.parameters(), *module.buffers())]
    return sum(map(_rounded, {storage._cdata: storage.nbytes() for storage in storages}.values()))


class _Watch(TorchDispatchMode):
    """Follows storages from the operation that makes them until they are freed, and records every operation."""

    def __init__(self, run: DryRun, places: ModulePlaces, fused: bool, converts: bool) -> None:
        super().__init__()
        self.run, self.places, self.fused, self.converts = run, places, fused, converts
        self.live = 0
        self.traffic = _FusedTraffic()
        self._alive: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for tensor in inputs:
            # Weights and arguments, through whatever view they come, are not ours; the tables of indices that an
            # attention makes in its first pass, and keeps, are.
            self._follow(tensor, ours=self.run.in_attention and not tensor.is_floating_point())
        result = func(*args, **(kwargs or {}))
        workspace = 0
        if func.overloadpacket is torch.ops.aten.convolution:
            result = result.contiguous(memory_format=suggest_memory_format(inputs[0]))
            if self.converts and not _is_channels_last(inputs[0]):
                workspace = touched_bytes(inputs[0]) + touched_bytes(result)
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if self.fused and all(t.device.type == "cpu" for t in outputs):
            return result
        made = [self._follow(t) for t in outputs]
        if (any(made) or func._schema.is_mutable) and func.overloadpacket not in _ALLOCATIONS:
            self._note(func, args, kwargs or {}, result, inputs, outputs)
        self.peak(workspace)
        return result

    def peak(self, workspace: int = 0) -> None:
        """Compare what is allocated now, with a workspace, to the peak so far."""
        now = self.live + workspace
        if now <= self.run.peak:
            return
        self.run.peak = now
        terms: Counter[str] = Counter()
        for _, size, place in self._alive.values():
            terms[place] += size
        terms["workspace"] += workspace
        self.run.terms = {place: size for place, size in terms.most_common() if size}

    def stop(self) -> None:
        """Forget the storages that outlive the run."""
        self._alive.clear()

    def record(
        self,
        kind: OperationKind,
        flops: int,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        *,
        fuses: bool = False,
        keys: int = 0,
    ) -> None:
        """Record one operation; `fuses` where a compiler would make it one with those beside it."""
        dtype = outputs[0].dtype if outputs else torch.float32
        if fuses and self.places.depth and not self.run.in_attention:  # which is never compiled with its block
            moved = self.traffic.inside(inputs, outputs)
            if moved:
                self.run.add(kind, 0, moved, dtype)
            return
        if written := self.traffic.outside(inputs):
            self.run.add("rest", 0, written, dtype)
        self.run.add(kind, flops, sum(map(touched_bytes, (*inputs, *outputs))), dtype, keys)

    def _follow(self, tensor: Tensor, ours: bool = True) -> bool:
        """Whether this is a new storage; if it is ours, it counts until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return False
        size = _rounded(storage.nbytes()) if ours else 0
        self._alive[key] = (weakref.ref(storage, partial(self._freed, key)), size, self.places.current)
        self.live += size
        return True

    def _freed(self, key: int, _: Any) -> None:
        entry = self._alive.pop(key, None)
        self.traffic.forget(key)
        if entry is not None:
            self.live -= entry[1]

    def _note(
        self, func: Any, args: Any, kwargs: Any, result: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        formula = flop_registry.get(func.overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0
        kind = _kind(func, flops, args)
        if kind == "rest" and self.run.in_attention and func.namespace != "aten":
            return  # a kernel that CountedAttention counts
        self.record(kind, flops, inputs, outputs, fuses=kind == "rest" and func.overloadpacket not in _UNFUSED)


class _FusedTraffic:
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


class _Fused(TorchFunctionMode):
    """Replaces attention and RMS norm by one operation each, as on a GPU."""

    def __init__(self, watch: _Watch, fused: bool) -> None:
        super().__init__()
        self.watch, self.fused = watch, fused

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.fused and func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if self.fused and func in (F.rms_norm, torch.rms_norm):
            out = torch.empty_like(args[0])
            self.watch.record("rest", 0, [args[0]], [out], fuses=True)
            return out
        return func(*args, **kwargs)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        # Kernels give the output the memory layout of the query.
        same = query.shape[-1] == value.shape[-1]
        out = torch.empty_like(query) if same else query.new_empty(*query.shape[:-1], value.shape[-1])
        tokens, width = query.shape[-2:]
        heads = query.shape[:-2].numel()  # of the whole batch, which may have several dimensions
        workspace = 4 * heads * tokens  # float32 logarithms of the sums
        kind: OperationKind = "attention"
        if width > WIDE_HEAD:
            kind = "wide attention"
            workspace += 0 if query.dtype == torch.float32 else 4 * out.numel()  # it accumulates in float32
        self.watch.peak(workspace)
        shapes = ((1, heads, *x.shape[-2:]) for x in (query, key, value))
        flops = sdpa_flop_count(*shapes)
        self.watch.record(kind, flops, (query, key, value), (out,), keys=key.shape[-2])
        return out


def _kind(func: Any, flops: int, args: Any) -> OperationKind:
    if not flops:
        return "rest"
    name = str(func.overloadpacket)
    if "attention" in name:
        return "wide attention" if args[0].shape[-1] > WIDE_HEAD else "attention"
    if "convolution" not in name:
        return "matmul"
    return "convolution" if _is_channels_last(args[0]) else "converted convolution"


def _is_channels_last(tensor: Tensor) -> bool:
    return suggest_memory_format(tensor) in (torch.channels_last, torch.channels_last_3d)


def touched_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor that an operation reads or writes; expanded values are read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _rounded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
