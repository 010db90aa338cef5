"""What a computation costs by a GPU's speed, which is measured or read from a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from sys import float_info
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luve_lightning.analysis.compiled import touched_bytes
from luve_lightning.analysis.dry_run import DryRun, Operation, OperationKind
from luve_lightning.machine import measure_ms
from luve_lightning.models.attention import Attention, Where
from luve_lightning.models.backbones import Denoiser

FirstUse = Literal["compiler", "forward", "training", "kernels"]
"""What takes a process longer once: starting torch.compile; compiling a block's graph for the forward pass, or for
forward and backward pass; building the kernels of the VAE's frames."""

_TERA = 1e12
# Where a speed's file does not say: 352 ms forward, 1384 ms forward and backward on one H100 (experiments/README.md).
_OF_BACKWARD = " backward"
_BACKWARD = 352 / (1384 - 352) * 2.5
_LAUNCH = 5e-6  # least seconds from one kernel's start to the next one's


@dataclass(frozen=True)
class GpuSpeed:
    """What one GPU really reaches, not the peaks on its data sheet.

    Attributes:
        name: name of the card.
        memory_gib: memory of the card; 0 where a processor was measured.
        tflops: TFLOP/s in 16-bit by kind of operation.
        bandwidth: memory bandwidth, TB/s.
        float32: share of `tflops` that remains in float32 (no TF32 except in convolutions, PyTorch's default); 1 for
            a kind that it leaves out.
        by_keys: TFLOP/s of "attention" in 16-bit by keys of each query, the more precise; may be empty.
        backward: rate of a kind's backward pass, as a share of the forward pass's; 1 for a kind that it leaves out.
        first_use: seconds of each first use; those that were not measured are missing.
        loading: what a DataLoader's processes bring to the GPU, TB/s; None where it was not measured.
        host: seconds of Python and the driver in a training step, for each "operation" of its passes and for what a
            "step" has beside them; empty where they were not measured.
    """

    name: str
    memory_gib: float
    tflops: Mapping[OperationKind, float]
    bandwidth: float
    float32: Mapping[OperationKind, float]
    by_keys: Mapping[int, float] = field(default_factory=dict)
    backward: Mapping[OperationKind, float] = field(default_factory=lambda: {"attention": _BACKWARD})
    first_use: Mapping[FirstUse, float] = field(default_factory=dict)
    loading: float | None = None
    host: Mapping[Literal["operation", "step"], float] = field(default_factory=dict)

    def training(self, passes: Mapping[Operation, int], beside: Mapping[Operation, int]) -> float | None:
        """Seconds of a training step; None where the rate of a kind of operation is not known.

        Args:
            passes: operations of the forward and backward pass. A GPU runs them no faster than they are launched.
            beside: those of the optimiser, after them, as where the host waits for gradients: see callbacks.NaNGuard.
        """
        computed, stepping = self.seconds(passes), self.seconds(beside)
        if computed is None or stepping is None:
            return None
        launched = self.host.get("operation", 0.0) * sum(passes.values())
        return max(computed, launched) + max(stepping, self.host.get("step", 0.0))

    def first_uses(self, uses: Iterable[FirstUse]) -> float | None:
        """Seconds of first uses, one after another; None where one was not measured."""
        found = list(uses)
        return sum(self.first_use[one] for one in found) if all(one in self.first_use for one in found) else None

    def loaded(self, size: int) -> float:
        """Least seconds in which a DataLoader brings a batch of so many bytes; 0 where that is not known."""
        return 0.0 if self.loading is None else size / (self.loading * _TERA)

    def seconds(self, operations: Mapping[Operation, int]) -> float | None:
        """Time of operations, run one after another, in seconds; None where the rate of a kind is not known."""
        if any(operation.flops and _forward(operation.kind) not in self.tflops for operation in operations):
            return None
        return sum(self._one(operation) * count for operation, count in operations.items())

    def _one(self, operation: Operation) -> float:
        traffic = max(_LAUNCH, operation.bytes / (self.bandwidth * _TERA))
        if not operation.flops:
            return traffic
        kind = _forward(operation.kind)
        rate = self.tflops[kind]
        if kind == "attention" and operation.keys and self.by_keys:
            rate = self._attention_over(operation.keys)
        rate *= self.backward.get(kind, 1) if kind != operation.kind else 1
        if operation.dtype == torch.float32:
            rate *= self.float32.get(kind, 1)
        return max(traffic, operation.flops / (rate * _TERA))

    def _attention_over(self, keys: int) -> float:
        """TFLOP/s between the two nearest measured numbers of keys, on their logarithm."""
        known = sorted(self.by_keys.items())
        for (fewer, slow), (more, fast) in pairwise(known):
            if fewer < keys < more:
                return slow + (fast - slow) * math.log(keys / fewer) / math.log(more / fewer)
        return known[0][1] if keys <= known[0][0] else known[-1][1]


def _forward(kind: OperationKind) -> OperationKind:
    """The kind of operation whose rate is known: that of the forward pass."""
    forward: Any = kind.removesuffix(_OF_BACKWARD)
    return forward


def total(seconds: Iterable[float | None]) -> float | None:
    """The sum of durations; None where one is not known."""
    found = list(seconds)
    return None if None in found else sum(one for one in found if one is not None)


# H200, measured: attention 580 TFLOP/s (cuDNN); the others fitted to one forward pass of Wan2.1-1.3B (1.1 s at
# 720p, 12.6 s at 2K, 61 s at 4K), the VLUer (18.5 ms to 2K) and the VAE in training (339 ms a step), all bfloat16.
# In float32, converted convolutions are fitted to decoding 720p in tiles (4.28 s); attention's backward pass to a
# step of the LFE at 2K (46.0 s).
REFERENCE = GpuSpeed(
    "h200",
    memory_gib=139.0,
    tflops={"attention": 580, "wide attention": 100, "matmul": 600, "convolution": 400, "converted convolution": 230},
    bandwidth=4.0,
    float32={
        "attention": 0.06,
        "wide attention": 0.3,
        "matmul": 0.08,
        "convolution": 0.4,
        "converted convolution": 0.585,
    },
    backward={"attention": 0.95},
)


# `measured_gpu`'s result on the reference: TFLOP/s of one attention kernel, TB/s of a copy.
_REFERENCE_ATTENTION, _REFERENCE_COPY = 690, 3.8


def measured_gpu() -> GpuSpeed:
    """The speed of PyTorch's current GPU: the reference where it is one, else measured in about a second.

    Attention and a copy in memory are timed, and the reference's rates are scaled in proportion: models reach less
    than a single kernel.
    """
    name, device = torch.cuda.get_device_name(), torch.device("cuda", torch.cuda.current_device())
    if REFERENCE.name in name.lower().split():
        return REFERENCE
    heads, tokens, width = 16, 16384, 128
    queries = torch.randn(1, heads, tokens, width, device=device, dtype=torch.bfloat16)
    attention = partial(F.scaled_dot_product_attention, queries, queries, queries)
    rate = 4 * heads * tokens**2 * width / _seconds(attention, device) / _TERA
    block = torch.zeros(2**27, device=device, dtype=torch.uint8)
    copied = 2 * block.nbytes / _seconds(block.clone, device) / _TERA
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    speed = _with_attention(REFERENCE, REFERENCE.tflops["attention"] * rate / _REFERENCE_ATTENTION)
    bandwidth = REFERENCE.bandwidth * copied / _REFERENCE_COPY
    return replace(speed, name=name, memory_gib=round(memory, 1), bandwidth=bandwidth)


def gpu_speed(gpu: str | None, tflops: float | None) -> GpuSpeed | None:
    """The GPU speed for estimates.

    Args:
        gpu: see `named_speed`; None means the GPU that PyTorch sees here.
        tflops: attention's rate; the other kinds of operation follow.

    Returns:
        None when neither is given and there is no GPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see `named_speed`; or a rate that is not positive.
    """
    if tflops is not None and not tflops > 0:
        raise ValueError(f"gpu_tflops: expected more than 0, got {tflops}")
    if gpu is not None:
        found = named_speed(gpu, "; or leave gpu out and give gpu_tflops")
    elif torch.cuda.is_available():
        found = measured_gpu()
    elif tflops is not None:  # assume that its memory keeps up as the reference's does
        bandwidth = REFERENCE.bandwidth * tflops / REFERENCE.tflops["attention"]
        found = replace(REFERENCE, name=f"{tflops:g} TFLOP/s", bandwidth=bandwidth)
    else:
        return None
    return found if tflops is None else _with_attention(found, tflops)


def named_speed(gpu: str, otherwise: str = "") -> GpuSpeed:
    """The speed of a GPU that an option names.

    Args:
        gpu: the reference's name, or a file that `luve bench --subject speed` wrote.
        otherwise: end of the message on what is neither: what else the command takes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another GPU's name, a folder, or a file without measurements.
    """
    file = Path(gpu)
    if gpu.lower() == REFERENCE.name:
        return REFERENCE
    if gpu and file.is_file():
        return read_speed(file)
    expected = f"expected {REFERENCE.name} or a file that luve bench --subject speed --output FILE wrote on your GPU"
    if gpu and file.is_dir():
        raise ValueError(f"gpu: {gpu} is a folder; {expected}{otherwise}")
    if file.suffix or len(file.parts) > 1:
        raise FileNotFoundError(f"gpu: no such file: {gpu}; {expected}{otherwise}")
    raise ValueError(f"gpu: {expected}, got {gpu!r}{otherwise}")


def read_speed(file: Path) -> GpuSpeed:
    """The speed in the rows of `luve bench --subject speed`, of which the last of each kind counts.

    Raises:
        ValueError: for a file that is none of these, or lacks a kind that every plan needs.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        rows = [_read_row(line, number) for number, line in enumerate(lines, 1) if line.strip()]
        return speed_of(row for row in rows if row.get("subject") == "speed")
    except (ValueError, LookupError) as error:
        raise ValueError(
            f"gpu: expected a file that luve bench --subject speed --output FILE wrote, {file} is none: {error}"
        ) from None


def _read_row(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is no JSON object")
    return row


def speed_of(rows: Iterable[Mapping[str, Any]]) -> GpuSpeed:
    """The speed in rows of `luve bench --subject speed`, of which the last of each kind counts.

    Raises:
        LookupError: when a row, or one of its values, is missing.
        ValueError: for rows of several GPUs, or a value that no bench wrote.
    """
    rows = [_checked(row) for row in rows]
    if len(gpus := sorted({row["gpu"] for row in rows})) > 1:
        raise ValueError(f"rows of several GPUs, {' and '.join(gpus)}; a file holds one GPU's")

    def of(kind: str) -> list[Mapping[str, Any]]:
        return [row for row in rows if row["kind"] == kind]

    known = get_args(FirstUse)  # another version of this package may know more
    first_use: Any = {row["of"]: row["seconds"] for row in of("first use") if row["of"] in known}
    host: Any = {row["of"]: row["seconds"] for row in of("host")}
    loading = of("loading")[-1]["tb_per_second"] if of("loading") else None
    by_keys = {row["keys"]: row["tflops"] for row in of("attention") if row["dtype"] == "bfloat16"}
    backward = {row["kind"].removesuffix(_OF_BACKWARD): row for row in rows if row["kind"].endswith(_OF_BACKWARD)}
    others = [row for row in rows if row["kind"] not in _OF_ROW and not row["kind"].endswith(_OF_BACKWARD)]
    rates = {(row["kind"], row["dtype"]): row["tflops"] for row in others}
    tflops: Any = {kind: rate for (kind, dtype), rate in rates.items() if dtype == "bfloat16"}
    for kind in (*REFERENCE.tflops, *(kind for kind, dtype in rates if dtype == "float32"), *backward):
        if kind not in tflops:
            raise LookupError(f"no row of {kind} in bfloat16")
    if not of("rest"):
        raise LookupError("no row of rest, the memory's")
    tflops["attention"] = by_keys[max(by_keys)]
    float32: Any = {kind: rate / tflops[kind] for (kind, dtype), rate in rates.items() if dtype == "float32"}
    share: Any = {"attention": _BACKWARD}
    for name, row in backward.items():
        if name == "attention" and row["keys"] not in by_keys:
            raise LookupError(f"no row of attention in bfloat16 with the {row['keys']} keys of attention backward")
        share[name] = row["tflops"] / (by_keys[row["keys"]] if name == "attention" else tflops[name])
    rest = of("rest")[-1]
    memory, bandwidth = rest["memory_gib"], rest["tb_per_second"]
    return GpuSpeed(rest["gpu"], memory, tflops, bandwidth, float32, by_keys, share, first_use, loading, host)


_OF_ROW = {
    "first use": ("of", "seconds"),
    "rest": ("memory_gib", "tb_per_second"),
    "host": ("of", "seconds"),
    "loading": ("tb_per_second",),
    f"attention{_OF_BACKWARD}": ("tflops", "keys"),
}


def _checked(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row, unless no bench wrote it so; it may have been edited by hand."""
    kind = row.get("kind")
    if not isinstance(kind, str):
        raise ValueError(f"a row's kind is {kind!r}; expected a text")
    needed = _OF_ROW.get(kind, ("tflops",) if kind.endswith(_OF_BACKWARD) else ("dtype", "tflops"))
    keys = ("keys",) if kind == "attention" and row.get("dtype") == "bfloat16" else ()
    for name in ("gpu", *needed, *keys):
        if name not in row:
            raise LookupError(f"a row of {kind} has no {name}")
        zero = name in ("seconds", "memory_gib")  # a processor's row has no memory of its own
        value, expected = row[name], f"a number {'at least' if zero else 'above'} 0"
        fits = type(value) in (int, float) and 0 <= value <= float_info.max and (value > 0 or zero)
        if name in ("gpu", "of", "dtype"):
            expected, fits = "a text", isinstance(value, str)
        elif name == "keys":
            expected, fits = "a whole number above 0", fits and isinstance(value, int)
        if not fits:
            raise ValueError(f"{kind}: {name}: expected {expected}, got {value!r}")
    return row


def _with_attention(speed: GpuSpeed, tflops: float) -> GpuSpeed:
    """This speed with another rate of attention, and the other rates in proportion."""
    ratio = tflops / speed.tflops["attention"]
    by_keys = {keys: rate * ratio for keys, rate in speed.by_keys.items()}
    return replace(speed, tflops={kind: rate * ratio for kind, rate in speed.tflops.items()}, by_keys=by_keys)


def _seconds(operation: Callable[[], object], device: torch.device) -> float:
    """The fastest of a few calls, in seconds."""
    return min(measure_ms(operation, device)[1] for _ in range(10)) / 1e3


@contextmanager
def counting_attention(denoiser: Denoiser, run: DryRun) -> Iterator[None]:
    """Count a replaced attention's own kernels, which leave no number of operations, by its `pairs`."""
    attention = denoiser.attention
    if attention is None:
        yield
        return
    denoiser.set_attention(CountedAttention(attention, run))
    try:
        yield
    finally:
        denoiser.set_attention(attention)


class _Boundary(torch.autograd.Function):
    """Leaves tensors as they are; its backward pass enters that of an attention, with a kernel, or leaves it."""

    @staticmethod
    def forward(ctx: Any, run: DryRun, enters: bool, kernel: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.run, ctx.enters, ctx.kernel = run, enters, kernel
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.run.in_attention = ctx.enters
        if ctx.kernel:
            ctx.run.add(*ctx.kernel)
        return None, None, None, *gradients


class CountedAttention:
    """An attention whose pairs that PyTorch's attention did not compute count as a kernel's that skips pairs.

    Args:
        attention: runs, on the meta device.
        run: counts it.
    """

    def __init__(self, attention: Attention, run: DryRun) -> None:
        self.attention, self.run = attention, run

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, where: Where, branch: nn.Module | None = None
    ) -> Tensor:
        """See Attention."""
        batch, _, heads, width = query.shape
        sigmas = where.sigmas or (0.0,) * batch
        pairs = sum(self.attention.pairs(where.grid, where.layer, sigma) for sigma in sigmas)
        before, self.run.in_attention = self.run.attended, True
        try:
            query, key, value = _Boundary.apply(self.run, False, (), query, key, value)
            output = self.attention(query, key, value, where, branch)
            missing = 4 * heads * width * pairs - (self.run.attended - before)
            kernel: tuple[Any, ...] = ()
            if missing > 0:
                moved = sum(map(touched_bytes, (query, key, value, output)))
                self.run.add("block-sparse attention", missing, moved, query.dtype)
                # Of two products the backward pass computes one again, and two gradients of each.
                kernel = "block-sparse attention", missing * 5 // 2, 2 * moved, query.dtype
            (output,) = _Boundary.apply(self.run, True, kernel, output)
        finally:
            self.run.in_attention = False
        return output
