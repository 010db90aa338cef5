"""`luve bench --subject two-gpus`: a training step shared by two GPUs beside one GPU's step with twice the batch."""

from __future__ import annotations

import gc
import json
import math
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from luve_lightning.analysis.benchmarks.experts import bench_model, randomize_expert
from luve_lightning.analysis.random_models import EXPERTS
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.models.attention import Attention
from luve_lightning.models.backbones import Recompute, denoiser_of
from luve_lightning.tasks import AdaptationTask, ExpertTask, FlowMatchingTask
from luve_lightning.tasks.watched_steps import StepPrecision, watched_steps

_STRATEGIES: dict[str, Literal["fsdp2", "ddp"]] = {"adaptation": "fsdp2", "lfe": "ddp"}
_LEVELS = {"adaptation": (0.4, 0.9), "lfe": (0.9, 0.97)}  # noise levels of the two samples
_ROUNDING = {
    "swapped": [(1, 0)],
    "apart": [(0,), (1,)],
}  # batches of one device's step, which differs by rounding alone
_RECOMPUTE: Recompute = "all_but_attention"


@dataclass(frozen=True)
class _Setup:
    """What all processes of a measurement share: plain values, which another process can be given."""

    folder: Path
    device: Literal["cpu", "cuda"]
    latents: Size3d
    step_latents: Size3d
    text: tuple[int, int]
    channels: int
    precision: StepPrecision
    attention: dict[str, Any] | None
    repeats: int
    port: int


def measure(
    device: torch.device,
    repeats: int = 1,
    attention: Attention | None = None,
    small: Size3d | None = None,
    precision: StepPrecision | None = None,
) -> Iterator[dict[str, Any]]:
    """Compare one training step on two GPUs with one GPU's on both samples, then time a step of full size.

    The adaptation is sharded (FSDP2), the LFE data parallel (DDP), both by the tasks' own Trainer: gradients clipped
    to norm 1, AdamW at 1e-4.

    Args:
        device: GPUs 0 and 1 run Wan2.1-1.3B, a CPU's two processes the mini backbone; a GPU's number is ignored.
        repeats: timed steps after a warm-up; the least time counts.
        attention: of the transformer; None is its own, dense.
        small: latent frames, height and width of the compared steps: both samples and all weights must fit on one
            GPU. Default 5 x 46 x 80 on a GPU, (5, 24, 24) on a CPU.
        precision: the Trainer's precision in the compared steps; default bf16-mixed on a GPU, 32-true on a CPU. In
            32-true rounding is a thousand times smaller.

    Yields:
        Three rows a task. `what` is "two devices"; or what rounding alone does on one device: "swapped", whose two
        samples changed places, and "apart", which takes one after the other and adds their gradients up, each
        rounded by itself as on two devices. Differences from one device's step are ||a - b|| / ||b|| over all
        trained tensors: `gradient` (before clipping), `update` (of the weights), `weights`; `gradient_worst` is of
        the worst tensor. Then one row of the sharded adaptation at the full size (2K on a GPU, in bfloat16): seconds
        of a step, and peak GiB of the first device.

    Raises:
        ValueError: when there is only one GPU.
    """
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        raise ValueError(f"two-gpus: expected 2 CUDA devices, found {torch.cuda.device_count()}")
    model = bench_model(device)
    default = (5, 24, 24) if device.type == "cpu" else (5, 46, 80)
    with tempfile.TemporaryDirectory() as folder:
        denoiser = denoiser_of(model.transformer(device))
        channels = denoiser.channels
        denoiser.save(Path(folder) / "transformer", model.dtype)
        del denoiser
        record = None if attention is None else attention.record()
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = int(listener.getsockname()[1])
        setup = _Setup(
            folder=Path(folder),
            device="cpu" if device.type == "cpu" else "cuda",
            latents=small or default,
            step_latents=model.latents,
            text=(model.text, model.sizes["text_dim"]),
            channels=channels,
            precision=precision or ("32-true" if device.type == "cpu" else "bf16-mixed"),
            attention=record,
            repeats=repeats,
            port=port,
        )
        facts = {"subject": "two-gpus", "model": model.name, "attention": record}
        for name in _STRATEGIES:
            one = _one_device(setup, name, [(0, 1)])
            save_file(one, setup.folder / f"{name}.safetensors")
            for what, batches in _ROUNDING.items():
                _free(device.type)
                other = _Differences(one)
                for key, tensor in _one_device(setup, name, batches).items():
                    other.see(key, tensor.to(device))
                _write(setup, name, setup.latents, {"what": what} | other.row())
            del one, other
            _free(device.type)
        start_processes(_shared, (setup,), nprocs=2, start_method="forkserver")
        for line in (setup.folder / "rows.jsonl").read_text().splitlines():
            yield facts | json.loads(line)


class _Given:
    """Trains on the noise and the noise levels that its batch holds, whatever the process."""

    def training_step(self: Any, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss: Tensor = self.losses_of(batch["latents"], self.text(batch), batch["sigma"], batch["noise"]).mean()
        return loss


class _GivenAdaptation(_Given, AdaptationTask):
    """The adaptation on given noise."""


class _GivenExpert(_Given, ExpertTask):
    """An expert on given noise."""


def _one_device(setup: _Setup, name: str, samples: list[tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights before and after one step on one device, and gradients, on the CPU; `samples` by batch."""
    found: dict[str, Tensor] = {}

    def keep(key: str, tensor: Tensor) -> None:
        found[key] = tensor.to("cpu", copy=True)

    batches = [_batch(setup, name, setup.latents, batch) for batch in samples]
    watched_steps(_task(setup, name), batches, setup.folder, setup.device, setup.precision, see=keep)
    return found


def _shared(rank: int, setup: _Setup) -> None:
    """One of the two processes: the compared steps, then the timed one."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(setup.port), "WORLD_SIZE": "2", "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
    }  # fmt: skip
    if setup.device == "cpu":
        torch.set_num_threads(1)
    for name, strategy in _STRATEGIES.items():
        with safe_open(setup.folder / f"{name}.safetensors", "pt") as one:
            differences = _Differences(one)
            watched_steps(
                _task(setup, name), [_batch(setup, name, setup.latents, (rank,))], setup.folder, setup.device,
                setup.precision, strategy, devices=2, see=differences.see if rank == 0 else _nothing,
            )  # fmt: skip
        if rank == 0:
            _write(setup, name, setup.latents, {"what": "two devices"} | differences.row())
        _free(setup.device)
    _time_a_step(rank, setup)
    dist.barrier()  # the first process holds the store that the other still uses
    dist.destroy_process_group()


def _nothing(key: str, tensor: Tensor) -> None:
    """Look at nothing, but take part in putting the tensors together."""


def _time_a_step(rank: int, setup: _Setup) -> None:
    """The sharded adaptation at the full size, one sample a device."""
    precision: StepPrecision = "32-true" if setup.device == "cpu" else "bf16-mixed"
    task, batch = _task(setup, "adaptation"), _batch(setup, "adaptation", setup.step_latents, (rank,))
    steps = 1 + setup.repeats
    seconds = watched_steps(task, [batch], setup.folder, setup.device, precision, "fsdp2", devices=2, steps=steps)
    row: dict[str, Any] = {"what": "step", "precision": precision, "step_s": round(min(seconds[1:]), 3)}
    if setup.device == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    if rank == 0:
        _write(setup, "adaptation", setup.step_latents, row)


class _Differences:
    """Sums of squared differences from another step's tensors, one by one as they come.

    Args:
        others: the tensors, or an open safetensors file of them.
    """

    def __init__(self, others: Any) -> None:
        self.others = others
        self.before: dict[str, Tensor] = {}
        self.squares: dict[str, list[tuple[float, float]]] = {"gradient": [], "weights": [], "update": []}

    def see(self, key: str, tensor: Tensor) -> None:
        """Compare a tensor: "before", "gradient" or "weights", and the weight's name."""
        kind, _, name = key.partition(" ")
        if kind == "before":
            self.before[name] = tensor.to("cpu", copy=True)
            return
        other = self._other(key, tensor)
        self._add(kind, tensor, other)
        if kind == "weights":
            self._add("update", tensor - self.before[name].to(tensor), other - self._other(f"before {name}", tensor))

    def _other(self, key: str, like: Tensor) -> Tensor:
        found = self.others[key] if isinstance(self.others, dict) else self.others.get_tensor(key)
        return found.to(like)

    def _add(self, kind: str, a: Tensor, b: Tensor) -> None:
        self.squares[kind].append(((a - b).double().square().sum().item(), b.double().square().sum().item()))

    def row(self) -> dict[str, float]:
        """Relative differences over all tensors, and of the worst tensor's gradient."""
        found = {}
        for kind, squares in self.squares.items():
            differences, norms = zip(*squares, strict=True)
            found[kind] = math.sqrt(math.fsum(differences) / math.fsum(norms))
        found["gradient_worst"] = max(math.sqrt(off / norm) for off, norm in self.squares["gradient"] if norm)
        return {kind: float(f"{value:.3g}") for kind, value in found.items()}


def _task(setup: _Setup, name: str) -> FlowMatchingTask:
    """The task, the same in every process."""
    attention = None if setup.attention is None else Attention.from_record(setup.attention)
    torch.manual_seed(0)
    if name == "adaptation":
        return _GivenAdaptation(str(setup.folder), recompute=_RECOMPUTE, lr=1e-4, min_lr=1e-4, attention=attention)
    dtype = "float32" if setup.device == "cpu" or setup.precision == "32-true" else "bfloat16"
    task = _GivenExpert(str(setup.folder), EXPERTS[name], name, dtype=dtype, recompute=_RECOMPUTE, attention=attention)
    randomize_expert(task.transformer, name)
    return task


def _batch(setup: _Setup, name: str, latents: Size3d, samples: tuple[int, ...]) -> dict[str, Tensor]:
    """Some of the task's two samples."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"latents": (setup.channels, *latents), "noise": (setup.channels, *latents), "text": setup.text}
    both = {key: torch.randn(2, *shape, generator=generator) for key, shape in shapes.items()}
    both["sigma"] = torch.tensor(_LEVELS[name])
    return {key: value[list(samples)] for key, value in both.items()}


def _write(setup: _Setup, task: str, latents: Size3d, row: dict[str, Any]) -> None:
    facts = {"task": task, "strategy": _STRATEGIES[task], "precision": setup.precision, "latents": list(latents)}
    with (setup.folder / "rows.jsonl").open("a") as file:
        file.write(json.dumps(facts | row) + "\n")


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
