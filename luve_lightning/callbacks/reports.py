"""What a run measured, in files that tables read: an expert's gain in its band, and a training's last validation."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.console import Console

from luve_lightning.evaluation.tables import table_csv, table_markdown, table_rich
from luve_lightning.files import write_text
from luve_lightning.tasks.contracts import ExpertComparison

COLUMNS = (
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
        write_text(self.output, table_csv(COLUMNS, rows))
        write_text(self.output.with_suffix(".md"), table_markdown(COLUMNS, rows))
        title = f"flow-matching loss of held-out clips in each expert's band; low to high: 95 % ({self.output})"
        # fits a terminal of 80 columns.
        Console(emoji=False).print(table_rich(COLUMNS[:7], [{c: r[c] for c in COLUMNS[:7]} for r in rows], title=title))

    def _known(self) -> list[dict[str, Any]]:
        if not self.output.is_file():
            return []
        with self.output.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return [_numbers(row) for row in rows if set(row) == set(COLUMNS)]


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
