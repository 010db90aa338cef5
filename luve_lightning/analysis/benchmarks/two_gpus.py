"""`luve bench --subject two-gpus`: a training step shared by two GPUs beside one GPU's step with twice the batch."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException, start_processes

from luve_lightning.analysis.benchmarks.experts import BenchModel, bench_model, randomize_expert
from luve_lightning.analysis.random_models import EXPERTS
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.models.attention import Attention
from luve_lightning.models.backbones import Recompute, denoiser_of
from luve_lightning.tasks import AdaptationTask, ExpertTask, FlowMatchingTask
from luve_lightning.tasks.watched_steps import See, StepPrecision, watched_steps

_STRATEGIES: dict[str, Literal["fsdp2", "ddp"]] = {"adaptation": "fsdp2", "lfe": "ddp"}
_LEVELS = {"adaptation": (0.4, 0.9), "lfe": (0.9, 0.97)}  # noise levels of the two samples
_Samples = list[tuple[int, ...]]  # by batch
_ROUNDING: dict[str, _Samples] = {"swapped": [(1, 0)], "apart": [(0,), (1,)]}  # differ by rounding alone
_RECOMPUTE: Recompute = "all_but_attention"
_POLL_S = 0.3

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """What two processes measure together: a comparison, or the time of a step."""

    task: str
    precision: StepPrecision
    what: Literal["comparison", "step"]

    def facts(self) -> dict[str, Any]:
        """What rows of it say first."""
        return {"task": self.task, "strategy": _STRATEGIES[self.task], "precision": self.precision}


@dataclass(frozen=True)
class _Setup:
    """What both processes of a launch share: plain values, which another process can be given."""

    folder: Path
    device: Literal["cpu", "cuda"]
    latents: Size3d
    text: tuple[int, int]
    channels: int
    attention: dict[str, Any] | None
    step: dict[str, Any]
    repeats: int
    port: int = 0

    @property
    def rows(self) -> Path:
        """File that the first process writes to."""
        return self.folder / "rows.jsonl"


def measure(
    device: torch.device,
    repeats: int = 1,
    attention: Attention | None = None,
    small: Size3d | None = None,
    precision: StepPrecision | None = None,
    blocks: int = 4,
    step: bool = True,
    keep_attention: int = 11,
    compile: bool = True,
    offload: bool = False,
) -> Iterator[dict[str, Any]]:
    """Compare one training step on two GPUs with one GPU's on both samples, then time a step of full size.

    The adaptation is sharded (FSDP2), the LFE data parallel (DDP), both by the tasks' own Trainer: gradients clipped
    to norm 1, AdamW at 1e-4. The compared steps need no depth: a few blocks of real width do.

    Args:
        device: GPUs 0 and 1 run Wan2.1-1.3B, a CPU's two processes the mini backbone; a GPU's number is ignored.
        repeats: timed steps after a warm-up; the least time counts.
        attention: of the transformer; None is its own, dense.
        small: latent frames, height and width of the compared steps: both samples and three copies of the weights
            must fit on one GPU. Default 5 x 46 x 80 on a GPU, (5, 24, 24) on a CPU.
        precision: the Trainer's precision in the compared steps; default both on a GPU, 32-true on a CPU. In 32-true
            rounding is a thousand times smaller.
        blocks: number of blocks in the compared steps.
        step: also time a step of full size.
        keep_attention: see `Denoiser.set_recompute`; in the timed step.
        compile: compile the blocks in the timed step.
        offload: see `Denoiser.set_recompute`; in the timed step.

    Yields:
        Rows as they are measured, three for each task and precision. `what` is "two devices"; or what rounding alone
        does on one device: "swapped", whose two samples changed places, and "apart", which takes one after the other
        and adds their gradients up, each rounded by itself as on two devices. Differences from one device's step are
        ||a - b|| / ||b|| over all trained tensors: `gradient` (before clipping), `update` (of the weights),
        `weights`; `gradient_worst` is of the worst tensor. Then one row of the sharded adaptation at the full size
        and depth (2K on a GPU, in bfloat16): seconds of the warm-up and of a step, and peak GiB of the first device.
        What fails has a row with its `error`, and the rest goes on. `at_s` is when the row came, in seconds.

    Raises:
        ValueError: when there is only one GPU, or for a number of blocks that the model does not have.
    """
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        raise ValueError(f"two-gpus: expected 2 CUDA devices, found {torch.cuda.device_count()}")
    began, whole = time.perf_counter(), bench_model(device)
    depth = whole.sizes["num_layers"]
    if not 1 <= blocks <= depth:
        raise ValueError(f"blocks: expected 1 to {depth}, got {blocks}")
    short = replace(
        whole,
        name=f"{whole.name}, {blocks} of {depth} blocks",
        sizes=whole.sizes | {"num_layers": blocks},
        latents=small or ((5, 24, 24) if device.type == "cpu" else (5, 46, 80)),
    )
    usual: list[StepPrecision] = ["32-true"] if device.type == "cpu" else ["32-true", "bf16-mixed"]
    chosen = usual if precision is None else [precision]
    compared = [_Job(task, kind, "comparison") for kind in chosen for task in _STRATEGIES]
    timed = [_Job("adaptation", usual[-1], "step")] if step else []
    options = {"keep_attention": min(keep_attention, depth), "compile": compile, "offload": offload}
    record = None if attention is None else attention.record()
    for model, jobs in ((short, compared), (whole, timed)):
        if not jobs:
            continue
        facts = {"subject": "two-gpus", "model": model.name, "latents": list(model.latents), "attention": record}
        with tempfile.TemporaryDirectory() as folder:
            for row in _rows(_setup(model, device, Path(folder), record, options, repeats), jobs):
                yield facts | row | {"at_s": round(time.perf_counter() - began, 1)}


def _setup(
    model: BenchModel,
    device: torch.device,
    folder: Path,
    attention: dict[str, Any] | None,
    step: dict[str, Any],
    repeats: int,
) -> _Setup:
    """Save the model, which the tasks load, and say what the processes need to know."""
    denoiser = denoiser_of(model.transformer(device))
    denoiser.save(folder / "transformer", model.dtype)
    kind: Literal["cpu", "cuda"] = "cpu" if device.type == "cpu" else "cuda"
    text, channels = (model.text, model.sizes["text_dim"]), denoiser.channels
    del denoiser
    _free(kind)
    return _Setup(folder, kind, model.latents, text, channels, attention, step, repeats)


def _rows(setup: _Setup, jobs: list[_Job]) -> Iterator[dict[str, Any]]:
    """Rows as two processes write them, one launch for all jobs; those after a job that fails get another."""
    while jobs:
        setup.rows.write_text("")
        given = replace(setup, port=_free_port()), jobs
        processes = start_processes(_work, given, nprocs=2, join=False, start_method="forkserver")
        seen, at, ended, error = 0, 0, False, ""
        while not ended:
            try:
                ended = processes.join(timeout=_POLL_S)
            except ProcessException as failure:
                _log.error("%s", failure)
                ended, error = True, str(failure).strip().splitlines()[-1]
            lines = setup.rows.read_text().rpartition("\n")[0].splitlines()
            for line in lines[seen:]:
                row = json.loads(line)
                at = row.pop("job")
                if row:
                    yield jobs[at].facts() | row
            seen = len(lines)
        if not error:
            return
        yield jobs[at].facts() | {"what": jobs[at].what, "error": error}
        jobs = jobs[at + 1 :]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class _Given:
    """Trains on the noise and the noise levels that its batch holds, whatever the process."""

    def training_step(self: Any, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss: Tensor = self.losses_of(batch["latents"], self.text(batch), batch["sigma"], batch["noise"]).mean()
        return loss


class _GivenAdaptation(_Given, AdaptationTask):
    """The adaptation on given noise."""


class _GivenExpert(_Given, ExpertTask):
    """An expert on given noise."""


def _work(rank: int, setup: _Setup, jobs: list[_Job]) -> None:
    """One of the two processes. The first one alone takes the steps of one device, and writes rows."""
    if setup.device == "cpu":
        torch.set_num_threads(1)
    for number, job in enumerate(jobs):
        rows = _Rows(setup.rows, number) if rank == 0 else None
        if job.what == "step":
            _time_a_step(rank, setup, job, rows)
        else:
            _compare(rank, setup, job, rows)
        _free(setup.device)
    dist.barrier()  # the first process holds the store that the other still uses
    dist.destroy_process_group()


class _Rows:
    """Appends rows of a job to a file. The first one is empty: the job has begun."""

    def __init__(self, file: Path, job: int) -> None:
        self.file, self.job = file, job
        self.write({})

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        with self.file.open("a") as file:
            file.write(json.dumps({"job": self.job} | row) + "\n")


def _compare(rank: int, setup: _Setup, job: _Job, rows: _Rows | None) -> None:
    """Steps of one device, which differ by rounding, then the step of both devices."""
    if rows is None:
        _two_devices(rank, setup, job, _nothing)
        return
    one: dict[str, Tensor] = {}
    _one_device(setup, job, [(0, 1)], lambda key, tensor: one.update({key: tensor.clone()}))
    for what, batches in _ROUNDING.items():
        differences = _Differences(one)
        _one_device(setup, job, batches, differences.see)
        rows.write({"what": what} | differences.row())
    differences = _Differences(one)
    _two_devices(rank, setup, job, differences.see)
    rows.write({"what": "two devices"} | differences.row())


def _one_device(setup: _Setup, job: _Job, samples: _Samples, see: See) -> None:
    batches = [_batch(setup, job.task, some) for some in samples]
    watched_steps(_task(setup, job), batches, setup.folder, setup.device, job.precision, see=see)
    _free(setup.device)


def _two_devices(rank: int, setup: _Setup, job: _Job, see: See | None, steps: int = 1, **options: Any) -> list[float]:
    """Steps that both processes share, each with its own sample; seconds of each."""
    task, batches = _task(setup, job, **options), [_batch(setup, job.task, (rank,))]
    with _torchrun(rank, setup.port):
        return watched_steps(
            task, batches, setup.folder, setup.device, job.precision, _STRATEGIES[job.task], 2, steps, see
        )


@contextmanager
def _torchrun(rank: int, port: int) -> Iterator[None]:
    """Variables as torchrun sets them; without them a Trainer is of one device."""
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    given["LOCAL_RANK"] = str(rank)
    os.environ |= given
    try:
        yield
    finally:
        for name in given:
            os.environ.pop(name, None)


def _nothing(key: str, tensor: Tensor) -> None:
    """Look at nothing, but take part in putting the tensors together."""


def _time_a_step(rank: int, setup: _Setup, job: _Job, rows: _Rows | None) -> None:
    """The sharded adaptation at the full size, one sample a device."""
    options = setup.step | {"compile": "inductor" if setup.step["compile"] else None}
    warm_up, *seconds = _two_devices(rank, setup, job, None, 1 + setup.repeats, **options)
    row = setup.step | {"what": "step", "warm_up_s": round(warm_up, 1), "step_s": round(min(seconds), 3)}
    if setup.device == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    if rows is not None:
        rows.write(row)


class _Differences:
    """Sums of squared differences from another step's tensors, one by one as they come.

    Args:
        others: the tensors, on the device.
    """

    def __init__(self, others: Mapping[str, Tensor]) -> None:
        self.others = others
        self.before: dict[str, Tensor] = {}
        self.squares: dict[str, list[tuple[float, float]]] = {"gradient": [], "weights": [], "update": []}

    def see(self, key: str, tensor: Tensor) -> None:
        """Compare a tensor: "before", "gradient" or "weights", and the weight's name."""
        kind, _, name = key.partition(" ")
        if kind == "before":
            self.before[name] = tensor.clone()
            return
        other = self.others[key]
        self._add(kind, tensor, other)
        if kind == "weights":
            self._add("update", tensor - self.before[name], other - self.others[f"before {name}"])

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


def _task(setup: _Setup, job: _Job, **options: Any) -> FlowMatchingTask:
    """The task, the same in every process."""
    options |= {"recompute": _RECOMPUTE}
    if setup.attention is not None:
        options["attention"] = Attention.from_record(setup.attention)
    torch.manual_seed(0)
    if job.task == "adaptation":
        return _GivenAdaptation(str(setup.folder), lr=1e-4, min_lr=1e-4, **options)
    dtype = "float32" if setup.device == "cpu" or job.precision == "32-true" else "bfloat16"
    task = _GivenExpert(str(setup.folder), EXPERTS[job.task], job.task, dtype=dtype, **options)
    randomize_expert(task.transformer, job.task)
    return task


def _batch(setup: _Setup, task: str, samples: tuple[int, ...]) -> dict[str, Tensor]:
    """Some of the task's two samples."""
    generator = torch.Generator().manual_seed(0)
    size = (setup.channels, *setup.latents)
    shapes = {"latents": size, "noise": size, "text": setup.text}
    both = {key: torch.randn(2, *shape, generator=generator) for key, shape in shapes.items()}
    both["sigma"] = torch.tensor(_LEVELS[task])
    return {key: value[list(samples)] for key, value in both.items()}


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
