"""Counting an operation's work and memory without running it on a GPU."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from luve_lightning.analysis.compiled import FusedTraffic, ModulePlaces, UnwrittenResults, touched_bytes

OperationKind = Literal[
    "attention",
    "attention backward",
    "wide attention",
    "block-sparse attention",
    "matmul",
    "convolution",
    "convolution backward",
    "converted convolution",
    "converted convolution backward",
    "rest",
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
        keys: keys of each query in "attention" and its backward pass, else 0.
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
    compiled_backward: bool = False  # while compiled modules' backward pass runs
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
            read and write only what is there before them and used after them, and the others have no memory.

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
        self.traffic = FusedTraffic()
        self._alive: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self.unwritten = UnwrittenResults(self._count)
        places.left = self._left

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for tensor in inputs:
            # Weights and arguments, through whatever view they come, are not ours; the tables of indices that an
            # attention makes in its first pass, and keeps, are.
            self._follow(tensor, ours=self.run.in_attention and not tensor.is_floating_point())
        fuses = self._fuses(func)
        if not fuses:
            attention = self.run.in_attention or "attention" in str(func.overloadpacket)
            for tensor in inputs:
                # What the backward pass of a product reads is kept: computed again it would have to be written again.
                saved = torch.is_grad_enabled() and any(o.requires_grad for o in inputs if o is not tensor)
                self.unwritten.read(_keys([tensor]), keep=attention or saved)
        result = func(*args, **(kwargs or {}))
        workspace = 0
        if func.overloadpacket is torch.ops.aten.convolution:
            result = result.contiguous(memory_format=suggest_memory_format(inputs[0]))
            if self.converts and not _is_channels_last(inputs[0]):
                workspace = touched_bytes(inputs[0]) + touched_bytes(result)
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if self.fused and all(t.device.type == "cpu" for t in outputs):
            return result
        made = [self._follow(t, sources=_keys(inputs) if fuses else None) for t in outputs]
        if (any(made) or func._schema.is_mutable) and func.overloadpacket not in _ALLOCATIONS:
            # A copy writes its destination, and does not read it.
            read = inputs[1:] if func.overloadpacket is torch.ops.aten.copy_ else inputs
            self._note(func, args, kwargs or {}, result, read, outputs)
        self.peak(workspace)
        return result

    def peak(self, workspace: int = 0) -> None:
        """Compare what is allocated now, with a workspace, to the peak so far."""
        now = self.live + workspace
        if now <= self.run.peak:
            return
        self.run.peak = now
        terms: Counter[str] = Counter()
        for key, (_, size, place) in self._alive.items():
            terms[place] += 0 if key in self.unwritten.counted_out else size
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
        if fuses and self._compiled:
            moved = self.traffic.inside(inputs, outputs)
            if moved:
                self.run.add(kind, 0, moved, dtype)
            return
        if written := self.traffic.outside(inputs):
            self.run.add("rest", 0, written, dtype)
        self.run.add(kind, flops, sum(map(touched_bytes, (*inputs, *outputs))), dtype, keys)

    @property
    def _compiled(self) -> bool:
        # Attention is never compiled with its block.
        return bool(self.places.depth or self.run.compiled_backward) and not self.run.in_attention

    def _fuses(self, func: Any) -> bool:
        return self._compiled and func.overloadpacket not in _UNFUSED | flop_registry.keys()

    def _left(self, output: Any) -> None:
        """A compiled module has returned: its outputs are written; what only its backward pass reads is not."""
        self.unwritten.read(_keys(t for t in tree_leaves(output) if isinstance(t, Tensor)), keep=True)
        if torch.is_grad_enabled():
            self.unwritten.forget_values()

    def _count(self, key: int, sign: int) -> None:
        self.live += sign * self._alive[key][1]

    def _follow(self, tensor: Tensor, ours: bool = True, sources: Collection[int] | None = None) -> bool:
        """Whether this is a new storage; if it is ours, it counts until it is freed.

        Where it has `sources`, it is computed from them by whatever reads it, and counts from when it is written.
        """
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return False
        size = _rounded(storage.nbytes()) if ours else 0
        self._alive[key] = (weakref.ref(storage, partial(self._freed, key)), size, self.places.current)
        self.live += size
        if sources is not None and size:
            self.unwritten.add(key, sources)
        return True

    def _freed(self, key: int, _: Any) -> None:
        self.traffic.forget(key)
        counted = self.unwritten.freed(key)
        entry = self._alive.pop(key, None)
        if entry is not None and counted:
            self.live -= entry[1]

    def _note(
        self, func: Any, args: Any, kwargs: Any, result: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        formula = flop_registry.get(func.overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0
        kind = _kind(func, flops, args)
        if kind == "rest" and self.run.in_attention and func.namespace != "aten":
            return  # a kernel that CountedAttention counts
        # (query, key, ...), or (gradient, query, key, ...)
        keys = args[1 + kind.endswith("backward")].shape[-2] if kind.startswith("attention") else 0
        fuses = kind == "rest" and func.overloadpacket not in _UNFUSED
        self.record(kind, flops, inputs, outputs, fuses=fuses, keys=keys)


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

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        if attn_mask is not None and attn_mask.stride(-1) != 1:
            return _attention_by_scores(query, key, value, attn_mask)
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
        read = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
        self.watch.record(kind, flops, read, (out,), keys=key.shape[-2])
        return out


def _attention_by_scores(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """What PyTorch does with a mask that no fused kernel takes, since its last dimension is not contiguous.

    All scores are computed, in float32, and rows in which no key is left are looked for: the operations of
    `_scaled_dot_product_attention_math` and `_safe_softmax`, in their order and as many copies.
    """
    first, second, third = query.float(), key.float(), value.float()
    scaled = first * 1.0
    scores = scaled @ (second.transpose(-2, -1) * 1.0)
    scores.add_(mask)
    weights = scores.softmax(-1)
    masked = scores.isneginf()
    rows = masked.all(-1, keepdim=True)
    torch.where(rows, scores.new_zeros(()), weights, out=weights)
    del scores, masked, rows
    weights.to(query.dtype)  # returned beside the result, which nobody takes
    return (weights @ third).to(query.dtype)


def _keys(tensors: Iterable[Tensor]) -> list[int]:
    return [tensor.untyped_storage()._cdata for tensor in tensors]


def _kind(func: Any, flops: int, args: Any) -> OperationKind:
    if not flops:
        return "rest"
    name = str(func.overloadpacket)
    if "attention" in name:
        narrow: OperationKind = "attention backward" if "backward" in name else "attention"
        return "wide attention" if args[0].shape[-1] > WIDE_HEAD else narrow
    if "convolution" not in name:
        return "matmul"
    last = _is_channels_last(args[0])
    # The gradient of the input alone, where weights are frozen, is a convolution like the forward pass's.
    if "backward" in name and args[-1][1]:
        return "convolution backward" if last else "converted convolution backward"
    return "convolution" if last else "converted convolution"


def _is_channels_last(tensor: Tensor) -> bool:
    return suggest_memory_format(tensor) in (torch.channels_last, torch.channels_last_3d)


def _rounded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
