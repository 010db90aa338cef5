"""A training run's last validation as a report from which a table of ablations takes metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L

from luve_lightning.files import write_text

_PREFIX = "val/"


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
            name.removeprefix(_PREFIX): float(value)
            for name, value in sorted(trainer.callback_metrics.items())
            if name.startswith(_PREFIX)
        }
        metrics = {name: {"value": value if math.isfinite(value) else None} for name, value in numbers.items()}
        content: dict[str, Any] = {"methods": {self.method: {"metrics": metrics}}, "step": trainer.global_step}
        write_text(self.output, json.dumps(content, indent=1) + "\n")
