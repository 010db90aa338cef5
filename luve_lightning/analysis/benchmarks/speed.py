"""`luve bench --subject speed`: what a GPU reaches in each kind of operation, for the estimates of `luve plan`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from luve_lightning.analysis.cost import CountedAttention, FirstUse
from luve_lightning.analysis.dry_run import OperationKind, dry_run, dry_training
from luve_lightning.analysis.model_parts import Parts, wan_1_3b
from luve_lightning.analysis.training_plan import TrainingFunctions, run_backward
from luve_lightning.datamodules.base import OutlivingLoader
from luve_lightning.functional.frequency import Grid
from luve_lightning.machine import cores, measure_ms
from luve_lightning.models.attention import Where
from luve_lightning.models.attention.tiles import Tiles
from luve_lightning.models.attention.windows import Windows
from luve_lightning.models.backbones import denoiser_of
from luve_lightning.models.vluer import VLUer
from luve_lightning.tasks.watched_steps import idle_step

_TERA = 1e12
_WORKERS = 8  # as experiments/ configures them


@dataclass(frozen=True)
class Sizes:
    """Sizes of the operations, those of Wan2.1-1.3B and its VAE on a GPU.

    Attributes:
        heads: attention heads.
        width: channels of a head.
        tokens: tokens of a matrix product and, in all windows together, of attention.
        keys: lengths of the windows that attend to themselves.
        grid: token grid of block-sparse attention.
        hidden: width of the feed-forward.
        wide: tokens and channels of the VAE's attention.
        convolved: channels, frames, rows and columns of a convolution.
        crop: the same, of a crop on which the VLUer trains.
        copied: numbers of a sum in memory.
        loaded: latents' channels, frames, rows and columns of a sample that a DataLoader brings, and how many batches.
        seconds: least time of each measurement: a GPU slows down under load.
    """

    heads: int
    width: int
    tokens: int
    keys: tuple[int, ...]
    grid: Grid
    hidden: int
    wide: tuple[int, int]
    convolved: tuple[int, int, int, int]
    crop: tuple[int, int, int, int]
    copied: int
    loaded: tuple[tuple[int, int, int, int], int]
    seconds: float


_WAN = Sizes(
    12,
    128,
    2**16,
    (2**10, 2**12, 2**14, 2**16),
    (13, 92, 160),
    8960,
    (14400, 384),
    (192, 6, 184, 320),
    (192, 11, 64, 64),
    2**28,
    ((16, 11, 128, 128), 48),
    0.5,
)
_SMALL = Sizes(
    2, 24, 2**9, (2**6, 2**9), (2, 8, 8), 128, (64, 272), (8, 3, 8, 8), (8, 3, 4, 4), 2**12, ((2, 2, 4, 4), 2), 0.0
)


def measure(device: torch.device, repeats: int = 3) -> Iterator[dict[str, Any]]:
    """Measure each kind of operation that `luve plan` distinguishes, at sizes of Wan2.1-1.3B.

    Args:
        device: a GPU; on a CPU, small sizes, whose speed says nothing.
        repeats: timed rounds of at least half a second, after one to warm up; the median counts.

    Returns:
        Rows with `kind`, `dtype` and `tflops`, of attention also `keys`, the tokens that each query attends to; and
        one row of the kind "rest" with the memory's bandwidth, `tb_per_second`, and its size. The row of the kind
        "loading" has the `tb_per_second` at which a DataLoader's processes bring crops of latents to the GPU. Rows of
        the kind "first use" have `seconds` beyond those of a later use, and `of`: "kernels" of the VAE's frames, where
        the GPU takes them; "compiler", "forward" and "training" of one transformer block, compiled with nothing in
        torch.compile's caches. Those of the kind "host" have the `seconds` of Python and the driver in a training step:
        of "operation", for each one that a plan counts, and of "step", for all else in one: Lightning, the callbacks,
        the optimiser and the batch.
    """
    sizes = _SMALL if device.type == "cpu" else _WAN
    bench = _Bench(device, sizes, repeats)
    traffic = bench.traffic()
    yield traffic
    for keys in sizes.keys:
        yield bench.attention(keys, torch.bfloat16)
    yield bench.attention_backward(sizes.keys[len(sizes.keys) // 2])
    yield bench.attention(sizes.keys[1], torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        yield bench.wide_attention(dtype)
        yield bench.matmul(dtype)
        yield bench.convolution("convolution", dtype)
        yield bench.convolution("converted convolution", dtype)
    yield bench.convolution_backward()
    yield bench.loading()
    yield from bench.host()
    yield from bench.first_uses()
    yield bench.block_sparse(traffic["tb_per_second"])  # after what shows the first use of torch.compile


class _Samples(Dataset[Tensor]):
    """Samples as a store of latents gives them."""

    def __init__(self, shape: tuple[int, ...], count: int) -> None:
        self.shape, self.count = shape, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return torch.full(self.shape, float(index), dtype=torch.float16)


class _Pairs(Dataset[dict[str, Tensor]]):
    """Crops of both resolutions as LatentPairsDataModule gives them, at twice the size."""

    def __init__(self, low: tuple[int, int, int, int], count: int) -> None:
        self.low, self.count = low, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        channels, frames, height, width = self.low
        shapes = {"hr": (channels, frames, 2 * height, 2 * width), "lr": self.low}
        return {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()} | {
            "scale": torch.tensor(2.0)
        }


class _Bench:
    def __init__(self, device: torch.device, sizes: Sizes, repeats: int) -> None:
        self.device, self.sizes, self.repeats = device, sizes, repeats
        cuda = device.type == "cuda"
        self.facts = {"gpu": torch.cuda.get_device_name(device) if cuda else "cpu"}
        memory = torch.cuda.get_device_properties(device).total_memory if cuda else 0
        self.memory_gib = round(memory / 2**30, 1)

    def attention(self, keys: int, dtype: torch.dtype) -> dict[str, Any]:
        """Windows that attend to themselves, as many as have `tokens` together."""
        size = self.sizes
        count = max(1, size.tokens // keys if dtype != torch.float32 else 1)
        q, k, v = (self._random(dtype, count, size.heads, keys, size.width) for _ in range(3))
        run = partial(F.scaled_dot_product_attention, q, k, v)
        return self._row("attention", dtype, 4 * count * size.heads * keys**2 * size.width, run) | {"keys": keys}

    def attention_backward(self, keys: int) -> dict[str, Any]:
        """The backward pass of windows, which computes one of the forward pass's two products again."""
        size = self.sizes
        count = max(1, size.tokens // keys)
        q, k, v = (self._random(torch.bfloat16, count, size.heads, keys, size.width).requires_grad_() for _ in range(3))
        output = F.scaled_dot_product_attention(q, k, v)
        run = partial(torch.autograd.grad, output, (q, k, v), torch.randn_like(output), retain_graph=True)
        flops = 10 * count * size.heads * keys**2 * size.width
        return self._rated("attention backward", torch.bfloat16, flops, self._seconds(run)) | {"keys": keys}

    def wide_attention(self, dtype: torch.dtype) -> dict[str, Any]:
        """One head of more channels than a flash kernel takes, as in the VAE."""
        tokens, width = self.sizes.wide
        q, k, v = (self._random(dtype, 4, 1, tokens, width) for _ in range(3))
        return self._row(
            "wide attention", dtype, 4 * 4 * tokens**2 * width, partial(F.scaled_dot_product_attention, q, k, v)
        )

    def matmul(self, dtype: torch.dtype) -> dict[str, Any]:
        """The first layer of a feed-forward."""
        size = self.sizes
        x = self._random(dtype, size.tokens, size.heads * size.width)
        weight, bias = self._random(dtype, size.hidden, x.shape[1]), self._random(dtype, size.hidden)
        return self._row("matmul", dtype, 2 * x.numel() * size.hidden, partial(F.linear, x, weight, bias))

    def convolution(self, kind: OperationKind, dtype: torch.dtype) -> dict[str, Any]:
        """A convolution of the VAE with its bias, channels last or not."""
        layout = torch.channels_last_3d if kind == "convolution" else torch.contiguous_format
        channels, *space = self.sizes.convolved
        x = self._random(dtype, 1, channels, *space).contiguous(memory_format=layout)
        weight = self._random(dtype, channels, channels, 3, 3, 3).contiguous(memory_format=layout)
        bias = self._random(dtype, channels)
        outputs = (space[0] - 2) * (space[1] - 2) * (space[2] - 2)
        return self._row(kind, dtype, 2 * 27 * channels**2 * outputs, partial(F.conv3d, x, weight, bias))

    def convolution_backward(self) -> dict[str, Any]:
        """Gradients of a convolution of the VLUer, channels last, of a training crop's size; the bias's is a sum."""
        channels, *space = self.sizes.crop
        layout = torch.channels_last_3d
        x = self._random(torch.bfloat16, 2, channels, *space).contiguous(memory_format=layout)
        weight = self._random(torch.bfloat16, channels, channels, 3, 3, 3).contiguous(memory_format=layout)
        bias = self._random(torch.bfloat16, channels).requires_grad_()
        x, weight = x.requires_grad_(), weight.requires_grad_()
        output = F.conv3d(x, weight, bias, padding=1)
        run = partial(torch.autograd.grad, output, (x, weight, bias), torch.randn_like(output), retain_graph=True)
        return self._row("convolution backward", torch.bfloat16, 2 * 2 * 27 * channels * output.numel(), run)

    def traffic(self) -> dict[str, Any]:
        """A sum of two tensors."""
        x, y = (self._random(torch.bfloat16, self.sizes.copied) for _ in range(2))
        seconds = self._seconds(partial(torch.add, x, y))
        rate = 3 * x.nbytes / seconds / _TERA
        row = {"subject": "speed", "kind": "rest", "memory_gib": self.memory_gib, "ms": round(1e3 * seconds, 4)}
        return row | {"tb_per_second": float(f"{rate:.4g}")} | self.facts

    def loading(self) -> dict[str, Any]:
        """What a DataLoader's processes bring when nothing else is done: through shared memory and a pinned copy."""
        cuda = self.device.type == "cuda"
        shape, batches = self.sizes.loaded
        workers = self._workers
        ahead = 2 * workers  # made while the first one is waited for
        loader = self._loader(_Samples(shape, 2 * (batches + ahead + 1)))
        size, start = 0, 0.0
        for number, batch in enumerate(loader):
            if number == ahead:
                start = time.perf_counter()
            moved = batch.to(self.device, non_blocking=True)
            if cuda:
                torch.cuda.synchronize(self.device)
            size += moved.nbytes if number > ahead else 0
        rate = size / (time.perf_counter() - start) / _TERA
        row = {"subject": "speed", "kind": "loading", "workers": workers, "tb_per_second": float(f"{rate:.4g}")}
        return row | self.facts

    @property
    def _workers(self) -> int:
        return min(_WORKERS, cores()) if self.device.type == "cuda" else 1

    def _loader(self, data: Dataset[Any]) -> OutlivingLoader[Any]:
        """Batches of two, as configured."""
        pinned = self.device.type == "cuda"
        return OutlivingLoader(data, batch_size=2, num_workers=self._workers, pin_memory=pinned)

    def block_sparse(self, bandwidth: float) -> dict[str, Any]:
        """Tiles of 4 x 8 x 8 tokens that attend to the nearest 4 x 3 x 3, less the traffic of changing their order.

        Args:
            bandwidth: TB/s.
        """
        size = self.sizes
        attention, where = Tiles(tile=(4, 8, 8), reach=(4, 3, 3)), Where(size.grid, 0)
        shape = (1, prod(size.grid), size.heads, size.width)
        q, k, v = (self._random(torch.bfloat16, *shape) for _ in range(3))
        with dry_run() as run:
            CountedAttention(attention, run)(q.to("meta"), k.to("meta"), v.to("meta"), where)
        reordering = sum(done.bytes * count for done, count in run.operations.items() if done.kind == "rest")
        seconds = self._seconds(partial(attention, q, k, v, where)) - reordering / (bandwidth * _TERA)
        pairs = attention.pairs(size.grid, 0, 0.0)
        return self._rated("block-sparse attention", torch.bfloat16, 4 * size.heads * size.width * pairs, seconds)

    def host(self) -> Iterator[dict[str, Any]]:
        """A training step of a VLUer as deep as the base, too small to keep a GPU busy; and one without a model."""
        small, low, half = {"channels": 8, "hidden": 8, "query_channels": 8}, (2, 16, 3, 4, 4), torch.bfloat16

        def passes(net: VLUer, latents: Tensor) -> Tensor:
            return net(latents, (3, 6, 6)).abs().mean()

        with torch.device("meta"):
            planned, sample = VLUer(**small), torch.empty(low)
        functions = TrainingFunctions(half)
        with dry_training(functions) as run:
            loss = passes(planned, sample)
            functions.casts = None
            run_backward(loss)
        with self.device:
            net, latents = VLUer(**small), torch.randn(low)

        def train() -> None:
            net.zero_grad()
            with torch.autocast(self.device.type, half):
                loss = passes(net, latents)
            loss.backward()

        shape, batches = self.sizes.loaded
        data = _Pairs((shape[0], shape[1], shape[2] // 2, shape[3] // 2), 2 * max(3, batches))
        found = {
            "operation": self._seconds(train) / sum(run.operations.values()),
            "step": idle_step(self.device, self._loader(data)),
        }
        for of, seconds in found.items():
            row = {"subject": "speed", "kind": "host", "of": of, "seconds": float(f"{seconds:.4g}")}
            yield row | self.facts

    def first_uses(self) -> Iterator[dict[str, Any]]:
        """What takes longer once, with empty caches of compiled kernels.

        A block of the transformer is compiled on small latents: compiling takes as long for all sizes. Self-attention
        is replaced, as where blocks are compiled for large ones.
        """
        from torch._inductor.utils import fresh_cache  # imports the compiler

        with fresh_cache():
            if (seconds := self._building_kernels()) is not None:
                yield self._first("kernels", seconds)
            started = self._compiling((2, 8, 8), train=False)
            forward = self._compiling((2, 8, 12), train=False)
            yield self._first("compiler", max(0.0, started - forward))
            yield self._first("forward", forward)
            yield self._first("training", self._compiling((2, 12, 12), train=True))
        torch.compiler.reset()

    def _building_kernels(self) -> float | None:
        """Of a VAE of Wan2.1's; None where no kernels are built for this device."""
        if self.device.type != "cuda":
            return None
        codec = Parts(wan_1_3b(), torch.bfloat16, self.device, torch.bfloat16).codec
        if not codec.streams(torch.empty(1, codec.channels, 13, 90, 160, device="meta")):
            return None
        seconds = [self._wall_seconds(codec.build_kernels) for _ in range(2)]
        return max(0.0, seconds[0] - seconds[1])

    def _compiling(self, grid: Grid, train: bool) -> float:
        """Seconds that a block's first run with these latents takes beyond its second one."""
        size, cpu = self.sizes, self.device.type == "cpu"
        heads = {"num_attention_heads": size.heads, "attention_head_dim": size.width, "ffn_dim": size.hidden}
        configs = replace(wan_1_3b(), transformer=wan_1_3b().transformer | heads | {"num_layers": 1})
        denoiser = denoiser_of(Parts(configs, torch.float32 if cpu else torch.bfloat16, self.device).transformer)
        denoiser.module.requires_grad_(train)
        denoiser.use_attention(Windows(cuts=((1, 2, 2),)))
        denoiser.compile_blocks("aot_eager" if cpu else "inductor")
        latents = self._random(denoiser.dtype, 1, denoiser.channels, *grid)
        text = self._random(denoiser.dtype, 1, 16, denoiser.text_dim)

        def run() -> None:
            with torch.set_grad_enabled(train):
                velocity = denoiser.velocity(latents, torch.full((1,), 500.0, device=self.device), text)
            if train:
                velocity.float().square().mean().backward()

        first, second = (self._wall_seconds(run) for _ in range(2))
        return max(0.0, first - second)

    def _wall_seconds(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def _first(self, use: FirstUse, seconds: float) -> dict[str, Any]:
        row = {"subject": "speed", "kind": "first use", "of": use, "seconds": round(seconds, 2)}
        return row | self.facts

    def _row(self, kind: OperationKind, dtype: torch.dtype, flops: int, run: Callable[[], object]) -> dict[str, Any]:
        return self._rated(kind, dtype, flops, self._seconds(run))

    def _rated(self, kind: OperationKind, dtype: torch.dtype, flops: int, seconds: float) -> dict[str, Any]:
        rate = float(f"{flops / seconds / _TERA:.4g}")
        row = {"subject": "speed", "kind": kind, "dtype": str(dtype).removeprefix("torch."), "tflops": rate}
        return row | {"ms": round(1e3 * seconds, 4)} | self.facts

    def _seconds(self, run: Callable[[], object]) -> float:
        """Median seconds of one call among as many in a row as take `seconds`."""
        one = min(measure_ms(run, self.device)[1] for _ in range(3)) / 1e3
        calls = max(1, round(self.sizes.seconds / one))

        def row() -> None:
            for _ in range(calls):
                run()

        rounds = [measure_ms(row, self.device)[1] for _ in range(self.repeats + 1)]
        return statistics.median(rounds[1:]) / 1e3 / calls

    def _random(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype)
