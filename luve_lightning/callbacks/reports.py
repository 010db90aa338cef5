"""What a run measured, in files that tables read: an expert's gain, the last validation, a VLUer beside baselines."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import random
import statistics
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.console import Console
from torch import Tensor

from luve_lightning.cascade.upsampling import LatentUpsampler, LooseModels, baselines
from luve_lightning.evaluation.tables import table_csv, table_markdown, table_rich
from luve_lightning.evaluation.upsampling_comparison import (
    CEILING,
    COLUMNS,
    ClipScore,
    ComparisonRows,
    UpsamplingComparison,
    comparison_rows,
    gap_lines,
    gap_shares,
    gather_scores,
    method_names,
    report_markdown,
    rows_by_scale,
)
from luve_lightning.files import write_text
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.models.vluer import BaseVLUer, load_vluer
from luve_lightning.revision import revision_in_words
from luve_lightning.tasks.base import ExpertComparison, Upsampling
from luve_lightning.terminal import say

_LOSS_COLUMNS = (
    "expert",
    "before",
    "after",
    "difference",
    "low",
    "high",
    "clips",
    "run",
    "variant",
    "place",
    "filter",
    "sigma_low",
    "sigma_high",
    "rank",
)
_KEY = ("expert", "run", "variant")
_RESAMPLES = 10_000
_VALIDATION = "val/"


class ExpertLosses(L.Callback):
    """Writes and prints the result of `trainer.test` of an `ExpertTask`.

    One row per expert, run folder and variant of the clips: mean flow-matching loss before (the base alone) and
    after (with the expert) on the same clips, noise levels and noise; and the difference with a bootstrap 95 %
    interval over clips from `low` to `high`. Rows of other experts and runs are kept, so that they share one file.
    An untrained expert, which changes nothing, does not replace a result.

    Args:
        output: CSV file; the Markdown goes beside it.
    """

    def __init__(self, output: Path) -> None:
        # A configuration says `<run folder>/../losses.csv`, a file beside the experts' run folders.
        self.output = Path(os.path.normpath(output))
        if self.output.suffix != ".csv":
            raise ValueError(f"output: expected a file that ends in .csv, got {output}")

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write on the first process."""
        if not trainer.is_global_zero:
            return
        task: ExpertComparison = pl_module
        pairs = list(task.comparison.values())
        differences = [after - before for before, after in pairs]
        low, high = bootstrap_interval(differences)
        config = task.expert
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        row = {
            "expert": task.name,
            "before": statistics.fmean(before for before, _ in pairs),
            "after": statistics.fmean(after for _, after in pairs),
            "difference": statistics.fmean(differences),
            "low": low,
            "high": high,
            "clips": len(pairs),
            "run": Path(trainer.default_root_dir).name,
            "variant": getattr(datamodule, "variant", "plain"),
            "place": " ".join(config.places),
            "filter": "none" if config.filter is None else f"{config.filter.band} {config.filter.cutoff:g}",
            "sigma_low": config.band.low,
            "sigma_high": config.band.high,
            "rank": config.rank,
        }
        known = self._known()
        same = [other for other in known if all(other[k] == row[k] for k in _KEY)]
        if same and not any(differences) and any(other["difference"] for other in same):
            rank_zero_warn(
                f"expert {row['expert']} is untrained here (was --ckpt_path last meant?): {self.output} keeps its row"
            )
            return
        rows = [*(other for other in known if other not in same), row]
        write_text(self.output, table_csv(_LOSS_COLUMNS, rows))
        write_text(self.output.with_suffix(".md"), table_markdown(_LOSS_COLUMNS, rows))
        title = f"flow-matching loss of held-out clips in each expert's band; low to high: 95 % ({self.output})"
        # fits a terminal of 80 columns.
        shown = _LOSS_COLUMNS[:7]
        Console(emoji=False).print(table_rich(shown, [{c: r[c] for c in shown} for r in rows], title=title))

    def _known(self) -> list[dict[str, Any]]:
        if not self.output.is_file():
            return []
        with self.output.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return [_numbers(row) for row in rows if set(row) == set(_LOSS_COLUMNS)]


def _numbers(row: dict[str, str]) -> dict[str, Any]:
    words, counts = (*_KEY, "place", "filter"), ("clips", "rank")
    return {k: v if k in words else int(v) if k in counts else float(v or "nan") for k, v in row.items()}


def bootstrap_interval(values: Sequence[float], share: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; deterministic in the values.

    Args:
        values: at least one.
        share: share of the resampled means between the ends.
    """
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    cut = int((1 - share) / 2 * _RESAMPLES)
    return means[cut], means[-1 - cut]


class ValidationReport(L.Callback):
    """Writes what each validation logged as `val/...`, over the one before.

    The JSON has the form of `luve evaluate`'s, with one method: a metric of a table names the training's stage, this
    method and a number without `val/`, such as `loss` or `loss_sigma_0.000-0.556`. With `EMA` the numbers are the
    averaged weights', which `Export` saves.

    Args:
        output: JSON file; `{out}/table.json` in a table.
        method: name of the method.
    """

    def __init__(self, output: Path, method: str = "trained") -> None:
        self.output, self.method = Path(output), method
        if self.output.suffix != ".json":
            raise ValueError(f"output: expected a file that ends in .json, got {output}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write on the first process; sanity checks do not count."""
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        numbers = {
            name.removeprefix(_VALIDATION): float(value)
            for name, value in sorted(trainer.callback_metrics.items())
            if name.startswith(_VALIDATION)
        }
        metrics = {name: {"value": value if math.isfinite(value) else None} for name, value in numbers.items()}
        content: dict[str, Any] = {"methods": {self.method: {"metrics": metrics}}, "step": trainer.global_step}
        write_text(self.output, json.dumps(content, indent=1) + "\n")


_PACKAGES = ("torch", "lightning", "diffusers")


class UpsamplerComparison(L.Callback):
    """Compares upsamplers in `trainer.validate` and `trainer.test` (not in the validation inside `fit`).

    Prints one table per scale, writes all of them as CSV and Markdown, and logs the numbers. Expects batches of
    {"lr", "hr", "video", "scale", "clip_id"} and a module with `net` (a VLUer) and `codec`. Numbers are the same for
    any number of processes; time and memory are the machine's.

    Args:
        output: CSV of the test split; the Markdown goes beside it with the suffix `.md`. The validation split goes
            to `<name>-validate.csv`, so that it never replaces the test split's.
        extra: folders of more VLUers by name, such as {"vluer_shipped": "data/mini/vluer"}. The names `vluer`,
            `nearest`, `bilinear`, `bicubic`, `rgb_bicubic` and `vae` are taken.
        timed_clips: number of clips per scale on which to time the methods; the scores cover all clips.
    """

    def __init__(self, output: Path, extra: dict[str, Path] | None = None, timed_clips: int = 4) -> None:
        self.output = Path(output)
        if self.output.suffix != ".csv":
            raise ValueError(f"output: expected a file that ends in .csv, got {output}")
        if timed_clips < 1:
            raise ValueError(f"timed_clips: expected at least 1, got {timed_clips}")
        self.timed_clips = timed_clips
        self.extra = {name: Path(folder) for name, folder in (extra or {}).items()}
        self.names = method_names(self.extra)
        for name, folder in self.extra.items():
            if not (folder / "config.json").is_file():
                raise FileNotFoundError(f"extra: {name}: {folder} has no config.json; expected a saved VLUer")
        self.scores: list[ClipScore] = []
        self.comparison: UpsamplingComparison | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start afresh."""
        self.scores, self.comparison = [], None

    def _start(self, trainer: L.Trainer, pl_module: Any) -> None:
        task: Upsampling = pl_module
        codec, net = task.codec, task.net
        methods: dict[str, LatentUpsampler] = {"vluer": _in_precision(trainer, net)}
        for name, folder in self.extra.items():
            other = load_vluer(folder).to(task.device).eval()
            if other.config.latent_channels != codec.channels:
                raise ValueError(
                    f"extra: {name}: {folder} takes {other.config.latent_channels} latent channels, "
                    f"the VAE has {codec.channels}"
                )
            methods[name] = _in_precision(trainer, other)
        known = {name: method.of(LooseModels(codec)) for name, method in baselines().items()}
        self.comparison = UpsamplingComparison(codec, methods | known, self.timed_clips)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score a batch, except in the validation inside `fit`."""
        if trainer.state.fn in ("validate", "test"):
            if self.comparison is None:
                self._start(trainer, pl_module)
            assert self.comparison is not None
            self.scores += self.comparison.score_batch(batch)

    on_test_batch_end = on_validation_batch_end

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Combine the processes' scores and report.

        Here, not at the end of the epoch: Lightning skips the epoch's hooks in a process that had no clip.
        """
        if stage not in ("validate", "test"):
            return
        stage = "test" if stage == "test" else "validate"  # an enum until here
        scores, self.comparison = gather_scores(self.scores), None
        if not trainer.is_global_zero:
            return
        rows = comparison_rows(scores, self.names)
        if not rows:
            rank_zero_warn("no clip was compared: no table written")
            return
        learned = ["vluer", *self.extra]
        self._print(rows, learned, stage)
        self._log(trainer, rows, learned, stage)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # one batch must not replace a real table
            self._write(trainer, rows, learned, stage, scores)

    def _write(
        self, trainer: L.Trainer, rows: ComparisonRows, learned: Sequence[str], stage: str, scores: Sequence[ClipScore]
    ) -> None:
        output = self.output if stage == "test" else self.output.with_stem(f"{self.output.stem}-{stage}")
        write_text(output, table_csv(COLUMNS, [row | {"scale": f"{row['scale']:g}"} for row in rows]))
        text = report_markdown(rows, learned, _facts(trainer, stage, scores))
        write_text(output.with_suffix(".md"), text)
        say(Console(emoji=False), f"written to {output} and {output.with_suffix('.md')}")

    def _print(self, rows: ComparisonRows, learned: Sequence[str], stage: str) -> None:
        console = Console(emoji=False)
        for scale, part in rows_by_scale(rows):
            console.print()
            console.print(table_rich(COLUMNS[1:], part, f"{stage}, {scale:g}x"))
            for line in gap_lines(rows, scale, learned):
                console.print(line, highlight=False)

    def _log(self, trainer: L.Trainer, rows: ComparisonRows, learned: Sequence[str], stage: str) -> None:
        values = {
            f"{stage}/x{row['scale']:g}/{row['method']}/{column}": row[column] for row in rows for column in COLUMNS[2:]
        }
        for scale, _ in rows_by_scale(rows):
            shares = gap_shares(rows, scale, learned)
            values |= {f"{stage}/x{scale:g}/{name}/gap_closed": share for name, share in shares.items()}
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)


def _in_precision(trainer: L.Trainer, net: BaseVLUer) -> LatentUpsampler:
    """The model in the Trainer's precision; callback hooks run outside its autocast."""

    def upsample(latents: Tensor, size: Size3d) -> Tensor:
        with trainer.precision_plugin.forward_context():
            return net(latents, size)

    return upsample


def _facts(trainer: L.Trainer, stage: str, scores: Sequence[ClipScore]) -> dict[str, str]:
    """The machine and settings of the measurement."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    sizes = sorted({(s.frames, s.height, s.width) for s in scores})
    return {
        "split": "test" if stage == "test" else "validation",
        "clips": str(len({s.clip for s in scores})),
        "clips whose time was taken": str(len({s.clip for s in scores if s.cost and s.method != CEILING})),
        "frames, height x width": ", ".join(f"{t}, {h} x {w}" for t, h, w in sizes[:3]) + ", ..." * (len(sizes) > 3),
        "checkpoint": str(trainer.ckpt_path or f"the weights in memory, at step {trainer.global_step}"),
        "precision": str(trainer.precision),
        "device": f"{name}; {trainer.world_size} process(es)",
        "revision": revision_in_words(),
        "versions": ", ".join(f"{package} {metadata.version(package)}" for package in _PACKAGES),
    }
