"""The comparison of a VLUer with interpolation and with the VAE's own reconstruction, on held-out clips."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.console import Console
from torch import Tensor

from luve_lightning.analysis.upsampling_comparison import (
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
from luve_lightning.cascade.upsampling import LatentUpsampler, LooseModels, baselines
from luve_lightning.evaluation.tables import table_csv, table_rich
from luve_lightning.files import write_text
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.machine import revision_in_words
from luve_lightning.models.vluer import BaseVLUer, load_vluer
from luve_lightning.tasks.contracts import Upsampling
from luve_lightning.terminal import say

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
