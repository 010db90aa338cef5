"""A validation's numbers as a table of ablations reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from luve_lightning.ablations.graph import AblationPlanner, Contents
from luve_lightning.ablations.results import REPORT, collect
from luve_lightning.ablations.stage_process import write_done
from luve_lightning.ablations.table import AblationRow, MetricSpec, StageSpec, Table
from luve_lightning.callbacks import ValidationReport
from tests.helpers.resumable import Run, train


class Validations(L.Callback):
    """The error and the step of each validation."""

    def __init__(self) -> None:
        self.found: list[tuple[float, int]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.found.append((float(trainer.callback_metrics["val/error"]), trainer.global_step))


def test_the_last_validation_is_written_without_training_losses(tmp_path: Path) -> None:
    output, seen = tmp_path / "run" / "table.json", Validations()
    often: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": 3, "num_sanity_val_steps": 1}
    train(Run(tmp_path, steps=6, trainer=often, callbacks=(seen, ValidationReport(output, "mine"))))
    assert [step for _, step in seen.found] == [3, 6]
    assert seen.found[0][0] != seen.found[1][0]
    content = json.loads(output.read_text())
    assert content == {"methods": {"mine": {"metrics": {"error": {"value": seen.found[1][0]}}}}, "step": 6}


def test_a_sanity_check_writes_nothing(tmp_path: Path) -> None:
    output = tmp_path / "table.json"
    check: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": 5, "num_sanity_val_steps": 1}
    train(Run(tmp_path, steps=2, trainer=check, callbacks=(ValidationReport(output),)))
    assert not output.exists()


def test_a_table_takes_its_metrics_from_it(tmp_path: Path) -> None:
    """Also where a number is not finite: the metric is missing then, with a reason."""
    spec = StageSpec("adapt", "fit", (), {"output": "{out}"})
    metrics = {
        name: MetricSpec(name, "lower", "", "adapt", column, "trained", None, "lower")
        for name, column in (("loss", "error"), ("other", "sick"))
    }
    row = AblationRow("full", "full", {"adapt": spec})
    table = Table("t", "t", "w", "mini", (0,), "full", metrics, {"full": row})
    planner = AblationPlanner(table, tmp_path, lambda files, options: dict(options), Contents(tmp_path))
    [stage] = planner.plan({0: ["full"]}).stages.values()
    logged = {"val/error": torch.tensor(0.25), "val/sick": torch.tensor(math.nan), "train/loss": torch.tensor(3.0)}
    trainer: Any = SimpleNamespace(is_global_zero=True, sanity_checking=False, global_step=1, callback_metrics=logged)
    ValidationReport(stage.folder / REPORT).on_validation_end(trainer, L.LightningModule())
    write_done(stage, {})
    results = collect(planner, {0: ["full"]})
    assert results.values == {"full": {0: {"loss": 0.25}}}
    assert set(results.missing) == {"other"}


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"output: expected a file that ends in \.json, got .*table\.csv"):
        ValidationReport(tmp_path / "table.csv")
