"""Metrics of what the model makes, and sample videos, while it trains."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from luve_lightning.callbacks.repeatable import undisturbed
from luve_lightning.callbacks.stops import GracefulStop
from luve_lightning.data.video_files import read_video, write_video
from luve_lightning.evaluation.pictures import contact_sheet, side_by_side
from luve_lightning.evaluation.sample_sources import Samples, SampleSource, SampleVideo
from luve_lightning.evaluation.tables import table_csv
from luve_lightning.files import replacing, write_text
from luve_lightning.functional.patches import frechet_distance
from luve_lightning.machine import gather_mappings, on_every_rank
from luve_lightning.metrics.base import Unavailable, VideoMetric
from luve_lightning.metrics.content import MotionMetric
from luve_lightning.metrics.feature_moments import FeatureMoments
from luve_lightning.metrics.frechet_patch import FrechetPatchDistance

_COLUMNS = ("step", "n", "seconds")


_Rows = list[dict[str, Any]]


class SampleMetrics(L.Callback):
    """Every k optimiser steps and at the end, makes sample videos, measures them and keeps some as files.

    One callback does both because making a video is what takes time: the videos it keeps are among those it
    measures. Either can be left out (`metrics` empty, or `videos: 0`).

    Training is unaffected: weights, generators, modes and settings are bit for bit what they would be without it
    (`undisturbed`), and metrics with their networks are never part of the module or its checkpoints. Samples are
    made with the averaged weights, if there are any, at the start of the next step (or when training ends), after
    the step's checkpoints and stops.

    Processes share the videos and make equally many each, repeating some in the last round, so that sharded models
    stay in step; the metrics equal those of one process to the last bit. An error on one process ends the run on
    all.

    `<output>/metrics.csv` has a row per evaluation: step, n (videos), seconds, metrics. A resumed run continues
    it: a step that has its row is not measured again, and rows of later steps are dropped. Values go to all
    loggers as `<output's name>/<metric>`, with `<output's name>/n`. Compare Fréchet distances of equal n only.

    Args:
        source: makes the videos.
        metrics: metrics by name; null disables one. A Fréchet distance without a reference compares with the
            source's real videos. What cannot run here is named once and left out.
        every_n_steps: optimiser steps from one evaluation to the next.
        videos: number of videos to keep as files, the first ones.
        sheet: also draw them on `<output>/step-<step>.jpg`, five frames of each with its caption, and below them those
            of the real video that it should resemble, where the source has one: the held-out clip of the caption.
        budget_seconds: an evaluation ends with the round of videos that exceeds this; the first round is always
            made. None makes all videos. With a budget the metrics depend on the machine: what was left out is said
            each time, and `n` counts the rest.
        output: folder; videos go to `output/step-<step>/<number>-<words>.mp4`, and to wandb when that is a logger.
            None means `<default_root_dir>/samples`; two callbacks need two folders.
    """

    def __init__(
        self,
        source: SampleSource,
        metrics: dict[str, Metric | None] | None = None,
        every_n_steps: int = 1000,
        videos: int = 0,
        sheet: bool = False,
        budget_seconds: float | None = None,
        output: Path | None = None,
    ) -> None:
        if every_n_steps < 1 or videos < 0:
            raise ValueError(f"expected every_n_steps >= 1 and videos >= 0, got {every_n_steps} and {videos}")
        if budget_seconds is not None and not budget_seconds >= 0:
            raise ValueError(f"budget_seconds: expected at least 0, or null for no limit, got {budget_seconds}")
        self.source, self.every_n_steps = source, every_n_steps
        if sheet and not videos:
            raise ValueError("sheet: shows the videos that are kept, expected videos >= 1")
        self.videos, self.sheet, self.budget_seconds = videos, sheet, budget_seconds
        self.output, self._given = Path("samples"), output
        self.meter = SampleMeter(metrics or {}, source.has_reference)
        if not self.meter.names and not videos:
            raise ValueError("expected metrics, or videos >= 1 to keep: there is nothing to make samples for")
        self._rows: _Rows = []
        self._steps: set[int] = set()
        self._real = SampleTotals()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the folder."""
        self.output = Path(self._given or Path(trainer.default_root_dir) / "samples")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Load what is needed, and find out now what cannot be made or measured."""
        rows = on_every_rank(trainer.global_rank, lambda: self._read(trainer.global_step))
        # Rank zero's file counts: other ranks may see another disk.
        self._rows = gather_mappings({trainer.global_rank: rows})[0]
        self._steps = {row["step"] for row in self._rows}
        with undisturbed(trainer, pl_module):
            missing = on_every_rank(trainer.global_rank, lambda: self.meter.prepare(pl_module.device))
            for name, reason in gather_mappings(missing).items():
                rank_zero_warn(f"{self.output.name}: {name} is left out: {reason}")
                self.meter.leave_out(name)
            if not self._idle:
                shares = on_every_rank(trainer.global_rank, lambda: self._measure_real(trainer, pl_module))
                self._real = SampleTotals()
                for measured in gather_mappings(shares).values():
                    self._real.add(measured)
            self.meter.prepare(torch.device("cpu"))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate when the number of completed steps is a multiple."""
        if trainer.global_step % self.every_n_steps == 0:
            self._evaluate(trainer, pl_module, trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the result."""
        self._evaluate(trainer, pl_module, trainer.global_step)

    @property
    def _idle(self) -> bool:
        return not self.meter.names and not self.videos

    def _read(self, step: int) -> _Rows:
        """Rows of the steps up to this one."""
        path = self.output / "metrics.csv"
        if not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ())[:3] != _COLUMNS:
                raise ValueError(f"output: {path} is not a table of this callback; take another folder")
            rows = [row for row in reader if int(row["step"]) <= step]
        return [
            {name: _number(text) for name, text in row.items()} | {"step": int(row["step"]), "n": int(row["n"])}
            for row in rows
        ]

    def _measure_real(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[int, Measured]:
        """This rank's share of the real videos, if a distance needs them.

        One video is measured in full, to find out now and not hours later if a metric cannot measure such videos.
        """
        with self._open(trainer, pl_module) as samples:
            count = len(samples.real_names)
            if not samples.names or not count:
                raise ValueError(f"source: there are no held-out clips to make samples of for {self.output}")
            first = samples.real(trainer.global_rank % count)
            self.meter.measure(SampleVideo(first, first), samples.real_names[trainer.global_rank % count])
            mine = range(trainer.global_rank, count, trainer.world_size)
            wanted = mine if self.meter.without_reference() else []
            return {i: self.meter.features(samples.real(i), samples.real_names[i]) for i in wanted}

    def _open(self, trainer: L.Trainer, pl_module: L.LightningModule) -> AbstractContextManager[Samples]:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        return self.source.open(pl_module, datamodule, trainer.precision_plugin.forward_context)

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        """Make, measure and report, unless this step was evaluated already (or is 0)."""
        if self._idle or not step or step in self._steps:
            return
        self._steps.add(step)
        started = time.monotonic()
        with undisturbed(trainer, pl_module), ExitStack() as stack:

            def begin() -> Samples:
                self.meter.prepare(pl_module.device)
                stack.callback(self.meter.prepare, torch.device("cpu"))  # frees memory for training
                return stack.enter_context(self._open(trainer, pl_module))

            samples = on_every_rank(trainer.global_rank, begin)
            folder = self.output / f"step-{step:06d}"
            totals = self._make_all(trainer, samples, folder, started)
            if totals is not None and self.sheet:
                on_every_rank(trainer.global_rank, lambda: self._draw(trainer, samples, folder))
        if totals is not None:
            seconds = time.monotonic() - started
            on_every_rank(trainer.global_rank, lambda: self._report(trainer, samples, totals, step, seconds))

    def _make_all(self, trainer: L.Trainer, samples: Samples, folder: Path, started: float) -> SampleTotals | None:
        """Rounds in which each rank makes a video; None when the run should stop."""
        totals, count = SampleTotals(), len(samples.names)
        for start in range(0, count, trainer.world_size):
            index = start + trainer.global_rank
            measured = on_every_rank(trainer.global_rank, partial(self._make, trainer, samples, index, folder))
            over = self.budget_seconds is not None and time.monotonic() - started > self.budget_seconds
            ranks = gather_mappings({trainer.global_rank: (measured, over, _stop_requested(trainer))})
            for one, _, _ in ranks.values():
                if one is not None:
                    totals.add(one)
            if any(stop for _, _, stop in ranks.values()):
                rank_zero_info(f"{self.output.name}: left unfinished at step {trainer.global_step}, the run stops")
                return None
            if any(late for _, late, _ in ranks.values()):
                break
        if totals.count < count:
            rank_zero_warn(
                f"{self.output.name}, step {trainer.global_step}: budget_seconds = {self.budget_seconds:g} left out "
                f"{count - totals.count} of {count} videos, first {samples.names[totals.count]}; "
                f"the metrics are of n = {totals.count}"
            )
        return totals

    def _make(self, trainer: L.Trainer, samples: Samples, index: int, folder: Path) -> Measured | None:
        """One video, measured and perhaps written; None for a repetition, which only keeps the ranks in step."""
        count = len(samples.names)
        video = samples.make(index % count)
        if index >= count:
            return None
        if index < self.videos and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_video(folder / f"{samples.names[index]}.mp4", video.frames.numpy(), samples.fps)
        return self.meter.measure(video, samples.names[index])

    def _draw(self, trainer: L.Trainer, samples: Samples, folder: Path) -> None:
        """The sheet of the files that were written, on rank zero."""
        if not trainer.is_global_zero:
            return
        sheets = []
        for index, (name, caption) in enumerate(zip(samples.names, samples.captions, strict=True)):
            if index >= self.videos or not (path := folder / f"{name}.mp4").is_file():
                continue
            rows = {"sample": read_video(path)[0]}
            if samples.paired:
                rows["clip"] = samples.real(index).numpy()
            length = min(map(len, rows.values()))
            sheets.append(contact_sheet({label: frames[:length] for label, frames in rows.items()}, caption))
        if sheets:
            with replacing(folder.with_suffix(".jpg")) as temporary:
                side_by_side(sheets).save(temporary, format="JPEG", quality=88)

    def _report(self, trainer: L.Trainer, samples: Samples, totals: SampleTotals, step: int, seconds: float) -> None:
        """Table and loggers, on rank zero."""
        if not trainer.is_global_zero:
            return
        values = totals.results(self.meter, self._real)
        self._rows.append({"step": step, "n": totals.count, "seconds": seconds} | values)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            columns = list(dict.fromkeys([*_COLUMNS, *(name for row in self._rows for name in row)]))
            rows = [{name: row.get(name) for name in columns} for row in self._rows]
            write_text(self.output / "metrics.csv", table_csv(columns, rows))
        folder = self.output / f"step-{step:06d}"
        files = [folder / f"{name}.mp4" for name in samples.names[: min(self.videos, totals.count)]]
        kept = [(path, text) for path, text in zip(files, samples.captions, strict=False) if path.is_file()]
        finite = {name: value for name, value in (values | {"n": totals.count}).items() if math.isfinite(value)}
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.output.name}/{k}": v for k, v in finite.items()}, step=step)
            if isinstance(logger, WandbLogger) and kept:
                # Paths, not arrays: wandb encodes arrays with moviepy, which is not installed.
                paths: list[Any] = [str(path) for path, _ in kept]
                logger.log_video(f"{self.output.name}/videos", paths, step=step, caption=[text for _, text in kept])


def _stop_requested(trainer: L.Trainer) -> bool:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(callback, GracefulStop) and callback.requested for callback in callbacks)


def _number(text: str) -> float | None:
    return float(text) if text else None


@dataclass(frozen=True)
class Measured:
    """What one video adds to the metrics; small enough to send to another process.

    Attributes:
        scores: weight in the mean and score, by metric.
        features: features of the video's patches, N x D, by metric.
    """

    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)


class SampleMeter:
    """Measures single videos, and combines the results.

    The metrics' own states are not used: each video's contribution is gathered and added in the videos' order, so
    any number of processes gives the numbers of one, to the last bit.

    Args:
        metrics: VideoMetrics and FrechetPatchDistances by name; None is a disabled one.
        has_reference: whether the videos come with originals.

    Raises:
        ValueError: another kind of metric, one that needs prompts, or originals where there are none.
    """

    def __init__(self, metrics: Mapping[str, Metric | None], has_reference: bool) -> None:
        self.videos: dict[str, VideoMetric] = {}
        self.distances: dict[str, FrechetPatchDistance] = {}
        for name, metric in metrics.items():
            if isinstance(metric, FrechetPatchDistance):
                self.distances[name] = metric
            elif isinstance(metric, VideoMetric):
                if metric.full_reference and not has_reference:
                    raise ValueError(f"metrics: {name} compares with an original, and generated videos have none")
                if isinstance(metric, MotionMetric):
                    raise ValueError(f"metrics: {name} needs each video's motion video: measure it with luve evaluate")
                if metric.prompted:
                    raise ValueError(f"metrics: {name} needs each video's prompt: measure it with luve evaluate")
                self.videos[name] = metric
            elif metric is not None:
                raise ValueError(
                    f"metrics: {name}: expected a VideoMetric or FrechetPatchDistance, got {type(metric).__name__}"
                )

    @property
    def names(self) -> list[str]:
        """Names of the measured metrics."""
        return [*self.distances, *self.videos]

    def prepare(self, device: torch.device) -> dict[str, str]:
        """Load what the metrics need; returns, by name, why one cannot be measured here, in one line."""
        missing = {}
        for name, metric in (self.distances | self.videos).items():
            try:
                metric.prepare(device)
            except Unavailable as error:
                missing[name] = str(error)
        return missing

    def leave_out(self, name: str) -> None:
        """Stop measuring this metric."""
        self.distances.pop(name, None)
        self.videos.pop(name, None)

    def measure(self, video: SampleVideo, name: str) -> Measured:
        """The video's contribution; `name` decides where random patches lie."""
        scores = {
            metric: (one.weight(video.frames), one.score(video.frames, video.reference))
            for metric, one in self.videos.items()
        }
        features = {metric: one.features(video.frames, name) for metric, one in self.distances.items()}
        return Measured(scores, features)

    def without_reference(self) -> list[str]:
        """Fréchet distances without reference statistics: real videos stand in."""
        return [name for name, metric in self.distances.items() if metric.reference is None]

    def features(self, frames: Tensor, name: str) -> Measured:
        """Features of one real video, for the distances without a reference."""
        return Measured(
            features={metric: self.distances[metric].features(frames, name) for metric in self.without_reference()}
        )


class SampleTotals:
    """The sum of single videos' contributions."""

    def __init__(self) -> None:
        self.count = 0
        self.scores: dict[str, list[tuple[float, float]]] = {}
        self.moments: dict[str, FeatureMoments] = {}

    def add(self, measured: Measured) -> None:
        """Add one video; the order decides the last bits."""
        self.count += 1
        for name, score in measured.scores.items():
            self.scores.setdefault(name, []).append(score)
        for name, features in measured.features.items():
            moments = FeatureMoments.from_features(features)
            self.moments[name] = self.moments[name] + moments if name in self.moments else moments

    def results(self, meter: SampleMeter, real: SampleTotals) -> dict[str, float]:
        """The metrics' values, in the order of `meter.names`.

        Args:
            meter: measured the videos.
            real: totals of real videos, for the distances without a reference.
        """
        values = {}
        for name, metric in meter.distances.items():
            made = self.moments[name]
            if name in real.moments:
                truth = real.moments[name]
                values[name] = frechet_distance(truth.mean(), truth.cov(), made.mean(), made.cov())
            else:
                values[name] = metric.distance(made)
        for name in meter.videos:
            weights = math.fsum(weight for weight, _ in self.scores[name])
            values[name] = math.fsum(weight * score for weight, score in self.scores[name]) / weights
        return values
