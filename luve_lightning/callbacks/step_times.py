"""How long steps and clips take, in a record that tables read, and where that time goes on each process."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.profiler import ProfilerActivity, profile, schedule

from luve_lightning.files import warn_kept_in_memory
from luve_lightning.machine import MEASURED, PROFILED, UnitTimes, gather_mappings

_CLIP_PARTS = ("reading", "encoding", "writing", "waiting")
Spans = Sequence[tuple[float, float]]
"""Beginnings and ends in seconds."""


class StepTimes(L.Callback):
    """Writes what the optimiser steps of a training take to `measured.json` in its folder, on the first process.

    It holds what `UnitTimes.record` says of this process, the step where it `began`, the `step` where it is, and
    the number of `processes`. It is written after the first step, so that whoever waits for it sees that the run has
    begun, and when the run ends, is stopped or fails. Steps count from the end of one to the end of the next;
    validations do not, nor do those that StepParts watches. What it found is written as `parts`.
    """

    def __init__(self) -> None:
        self._times = UnitTimes("step")
        self._began = self._step = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The device is known."""
        self._times = UnitTimes("step", trainer.strategy.root_device)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The step where the run begins or resumes."""
        self._began = self._step = trainer.global_step
        self._times.begin()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the optimiser step if this batch completed one."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if any(parts.watches(self._step) for parts in _step_parts(trainer)):
            self._times.begin()
            return
        self._times.advance()
        if self._times.done == 1:
            self._write(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do not count its time; the memory it took counts."""
        self._times.note_memory()
        self._times.begin()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the last record."""
        self._write(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write it also when a signal or an error ends the run."""
        if trainer.state.fn == "fit" and self._times.done:
            self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = Path(trainer.default_root_dir) / MEASURED
        parts: dict[str, Any] = next(({"parts": one.found} for one in _step_parts(trainer) if one.found), {})
        try:
            self._times.write(path, began=self._began, step=self._step, processes=trainer.world_size, **parts)
        except OSError as error:  # it would be a pity to end a training for it
            warn_kept_in_memory(path.parent, error)


class ClipTimes(L.Callback):
    """Counts what a Trainer that predicts has made: each batch's items, unless the batch gave nothing new.

    When it is done, `found` holds the `rate` of all processes together, in items a second; where there are several, the
    mean `seconds_per_unit` of a process; and `parts`: the `seconds` from a process's first batch to the end and what
    they were spent on, each the mean of all processes: `reading`, waiting for a batch; `encoding`; `writing`, waiting
    for what is encoded to be stored; `waiting` for other processes at the end. In `parts`, `ranks` has the same of each
    process, with its number of items, seconds of one and GPU memory.

    Args:
        times: Counts them; the first device of the Trainer becomes its device.
    """

    def __init__(self, times: UnitTimes) -> None:
        self.times = times
        self.found: dict[str, Any] = {}
        self._own: dict[str, float] = {}
        self._at = self._written = 0.0

    def on_predict_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The first batch is being read."""
        self.times.device = trainer.strategy.root_device
        self.times.begin()
        self._at, self._written = time.perf_counter(), 0.0

    def on_predict_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any) -> None:
        """A batch has been read."""
        self._spend("reading")

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *rest: int
    ) -> None:
        """Count a batch."""
        self._spend("encoding")
        written, self._written = self._written, float(getattr(pl_module, "seconds_written", 0.0))
        if self._own:
            self._own["encoding"] -= self._written - written
            self._own["writing"] += self._written - written
        if not outputs:
            self.times.begin()
            return
        self.times.advance(len(batch))
        if not self._own:
            self._own = dict.fromkeys(_CLIP_PARTS, 0.0)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put all processes together, which have waited for each other."""
        self._spend("waiting")
        record = self.times.record()
        own = {"seconds": sum(self._own.values()), **self._own, "items": self.times.done}
        own |= {name: record[name] for name in ("seconds_per_unit", "peak_gib")}
        ranks = [one for one in gather_mappings({trainer.global_rank: own}).values() if one["seconds"]]
        if ranks:
            parts = {name: round(sum(one[name] for one in ranks) / len(ranks), 4) for name in ("seconds", *_CLIP_PARTS)}
            paces = [one["seconds_per_unit"] for one in ranks if one["seconds_per_unit"]]
            rate = sum(1 / pace for pace in paces) * len(ranks) / len(paces) if paces else None
            self.found = {"rate": rate, "parts": {**parts, "ranks": ranks}}
            if rate is not None and len(ranks) > 1:
                self.found["seconds_per_unit"] = round(len(ranks) / rate, 4)

    def _spend(self, what: str) -> None:
        now = time.perf_counter()
        if self._own:
            self._own[what] += now - self._at
        self._at = now


class StepParts(L.Callback):
    """Finds where the time of a training step goes on each process: two more steps under PyTorch's profiler.

    The first of them lets the profiler start, the second counts. On a GPU only kernels are recorded, and the device is
    waited for between the parts. Neither step counts in StepTimes, which writes `found` with its own record.

    `found` holds the `seconds` of that step and its parts, each the mean of all processes: `data`, from a step's end to
    the next batch; `compute`, the forward and backward pass; `communication` beside which a device computes nothing;
    `waiting` in such communication for the process that comes to it last; `optimizer`, with clipping and callbacks. And
    `ranks`, the same of each with `hidden`, communication beside computing, and its GPU's `peak_gib`.

    Args:
        after: optimiser steps of the whole run after which the two come.
    """

    def __init__(self, after: int) -> None:
        if after < 1:
            raise ValueError(f"after: expected at least 1 step, got {after}")
        self.after = after
        self.found: dict[str, Any] = {}
        self._first: int | None = None
        self._profile: profile | None = None
        self._times: dict[str, list[float]] = {}

    def watches(self, step: int) -> bool:
        """Whether the step that ended as the run's so many-th was one of the two."""
        return self._first is not None and self._first < step <= self._first + PROFILED

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any) -> None:
        """Begin to profile, or note that the batch is there."""
        if self._first is None and trainer.global_step >= self.after:
            self._first = trainer.global_step
            on_gpu = pl_module.device.type == "cuda"
            self._profile = profile(
                activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU],
                schedule=schedule(wait=0, warmup=1, active=1, repeat=1),
                acc_events=True,
            )
            self._profile.start()
        self._note("batch", pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """The gradients are there."""
        self._note("gradients", pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is done, or one of its batches."""
        self._note("end", pl_module)
        if self._profile is None or self._first is None or trainer.global_step == self._first:
            return
        if not self._times:
            self._profile.step()
            trainer.strategy.barrier()
            self._times = {"end": [_when_done(pl_module.device)], "batch": [], "gradients": []}
        elif trainer.global_step == self._first + PROFILED:
            ended, self._profile = self._profile, None
            ended.stop()
            own = self._own(trainer.global_rank, _trace(ended), pl_module.device)
            self._times = {}
            ranks = list(gather_mappings({trainer.global_rank: own}).values())
            if all(ranks):
                parts = [name for name in ranks[0] if name not in ("hidden", "peak_gib")]
                mean = {name: round(sum(one[name] for one in ranks) / len(ranks), 5) for name in parts}
                self.found = {**mean, "ranks": ranks}
            else:
                rank_zero_warn("the profiler saw no kernels: where a step's time goes stays unknown")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the profiler of a run that ends before its last step."""
        self._end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """End it also when a signal or an error ends the run."""
        self._end()

    def _end(self) -> None:
        ended, self._profile = self._profile, None
        self._times = {}
        if ended is not None:
            ended.stop()

    def _note(self, what: str, module: L.LightningModule) -> None:
        if self._times:
            self._times[what].append(_when_done(module.device))

    def _own(self, rank: int, trace: Mapping[str, Any], device: torch.device) -> dict[str, float]:
        """This process's parts; empty where the profiler saw nothing. All processes call it together."""
        ends, batches = self._times["end"], self._times["batch"]
        windows: dict[str, Spans] = {"all": [(ends[0], ends[-1])], "data": list(zip(ends, batches, strict=False))}
        windows["optimizer"] = [(self._times["gradients"][-1], ends[-1])]
        waited = waits(rank, gather_mappings({rank: collectives(trace)}))
        windows["waiting"] = within(waited, ends[0], ends[-1])
        told = exposed(trace, windows)
        if not told["computed"]:
            return {}
        alone = {name: sum(b - a for a, b in windows[name]) - told[name] for name in ("all", "data", "optimizer")}
        own = {
            "seconds": ends[-1] - ends[0],
            "data": alone["data"],
            "compute": alone["all"] - alone["data"] - alone["optimizer"],
            "communication": told["all"] - told["waiting"],
            "waiting": told["waiting"],
            "optimizer": alone["optimizer"],
            "hidden": told["hidden"],
        }
        if device.type == "cuda":
            own["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        return {name: round(value, 5) for name, value in own.items()}


def _step_parts(trainer: L.Trainer) -> list[StepParts]:
    return [one for one in trainer.callbacks if isinstance(one, StepParts)]  # type: ignore[attr-defined]


def _when_done(device: torch.device) -> float:
    """When the device has done what it was given, in seconds of the clock that traces have."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.time_ns() / 1e9


# What a profiler saw ------------------------------------------------------------------------------------------------


def _trace(ended: profile) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        ended.export_chrome_trace(str(path))
        found: dict[str, Any] = json.loads(path.read_bytes())
        return found


def _events(trace: Mapping[str, Any]) -> Iterator[tuple[str, bool, float, float]]:
    """Names, whether they communicate, beginnings and ends of what ran on the device.

    On a GPU, NCCL's kernels communicate, and all others and copies compute; on a CPU gloo and PyTorch's operators do.
    """
    began = trace.get("baseTimeNanoseconds", 0) / 1e9
    for event in trace["traceEvents"]:
        kind, name = event.get("cat"), event.get("name", "")
        gloo = kind == "user_annotation" and name.startswith("gloo:")
        computes = kind in ("kernel", "gpu_memcpy", "gpu_memset") or (kind == "cpu_op" and name.startswith("aten::"))
        if event.get("ph") == "X" and (gloo or computes):
            start = began + float(event["ts"]) / 1e6
            told = gloo or (kind == "kernel" and "nccl" in name.lower())
            yield name, told, start, start + float(event.get("dur", 0)) / 1e6


def collectives(trace: Mapping[str, Any]) -> dict[str, Spans]:
    """When a process communicated, by the name of what it did, in order."""
    found = defaultdict(list)
    for name, told, start, stop in _events(trace):
        if told:
            found[name].append((start, stop))
    return {name: sorted(spans) for name, spans in found.items()}


def waits(rank: int, ranks: Mapping[int, Mapping[str, Spans]]) -> Spans:
    """When a process had begun to communicate, and others had not; see `collectives`.

    A name that not all have equally often, as where processes form several groups, is left out.
    """
    found = []
    for name, own in ranks[rank].items():
        others = [one.get(name, ()) for one in ranks.values()]
        if {len(spans) for spans in others} == {len(own)}:
            last = [max(start for start, _ in together) for together in zip(*others, strict=True)]
            found += [(start, min(at, stop)) for (start, stop), at in zip(own, last, strict=True) if start < at]
    return found


def within(spans: Spans, start: float, stop: float) -> Spans:
    """The parts of spans between two moments: in the trace, processes first wait for each other's profilers."""
    return [(max(a, start), min(b, stop)) for a, b in spans if a < stop and b > start]


def exposed(trace: Mapping[str, Any], windows: Mapping[str, Spans]) -> Mapping[str, float]:
    """Seconds of communication without computing in each window, by a Chrome trace of PyTorch's profiler.

    Returns:
        Them by window, "hidden" seconds beside computing, and the number of "computed" kernels or operators.
    """
    found = defaultdict[str, float](float)
    bounds = [bound for name, spans in windows.items() for span in spans for bound in _bounds(name, *span)]
    for _, told, start, stop in _events(trace):
        found["computed"] += not told
        bounds += _bounds("told" if told else "computed", start, stop)
    before, active = 0.0, Counter[str]()
    for moment, kind, change in sorted(bounds):
        if active["told"] and active["computed"]:
            found["hidden"] += moment - before
        elif active["told"]:
            for name in filter(active.__getitem__, windows):
                found[name] += moment - before
        before = moment
        active[kind] += change
    return found


def _bounds(kind: str, start: float, stop: float) -> list[tuple[float, str, int]]:
    return [(start, kind, 1), (stop, kind, -1)]
