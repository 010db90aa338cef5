"""What is exported: the average at the end of training, or the weights that validation chose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from luve_lightning.callbacks import Export
from tests.helpers.resumable import CropsTask, Run, train
from tests.helpers.run_luve import run_luve

VALIDATE = {"limit_val_batches": 1, "val_check_interval": 3}


class Graded(CropsTask):
    """Validates with the errors it is given, remembers what was validated, and exports its weights."""

    def __init__(self, errors: list[float]) -> None:
        super().__init__()
        self.errors = iter(errors)
        self.validated: list[dict[str, Tensor]] = []

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.named_parameters() if p.requires_grad}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validated.append(self.weights())
        self.log("val/error", next(self.errors))

    def export(self, folder: Path, datamodule: Any) -> None:
        folder.mkdir(exist_ok=True)
        torch.save(self.weights(), folder / "weights.pt")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("weights", "chosen"), [("best", 1), ("last", 3)])
def test_the_chosen_weights_are_exported(tmp_path: Path, weights: Any, chosen: int) -> None:
    task = Graded([2.0, 0.5, 1.0, 3.0])
    export = Export(tmp_path / "out", weights)
    run = Run(tmp_path / "run", steps=12, monitor="val/error", trainer=VALIDATE, callbacks=(export,))
    after: list[dict[str, Tensor]] = []
    export_callback = export.on_fit_end

    def and_remember(trainer: L.Trainer, module: Any) -> None:
        before = module.weights()
        export_callback(trainer, module)
        after.extend([before, module.weights()])

    export.on_fit_end = and_remember  # type: ignore[method-assign]
    train(run, task)
    exported = torch.load(tmp_path / "out" / "weights.pt", weights_only=True)
    assert [equal(exported, seen) for seen in task.validated] == [i == chosen for i in range(4)]
    assert equal(*after), "the module keeps its own weights"


def test_without_a_validation_the_last_weights_are_the_best(tmp_path: Path) -> None:
    task = Graded([])
    out = Export(tmp_path / "out", "best")
    train(Run(tmp_path / "run", steps=2, monitor="val/error", callbacks=(out,)), task)
    assert (tmp_path / "out" / "weights.pt").is_file()


def test_best_needs_a_metric(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", steps=2, callbacks=(Export(tmp_path / "out", "best"),))
    with pytest.raises(ValueError, match="weights: best needs a Checkpoints callback with a metric to monitor"):
        train(run, Graded([]))


def test_ckpt_path_best_is_the_run_folders(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"""
trainer:
  {{default_root_dir: {tmp_path}, max_steps: 2, val_check_interval: 2, accelerator: cpu,
  enable_progress_bar: false}}
model: {{class_path: tests.helpers.tiny.TinyModule}}
data: {{class_path: tests.helpers.tiny.TinyData}}
callbacks:
  keep: {{class_path: luve_lightning.callbacks.Checkpoints, init_args: {{monitor: val_loss, mode: min}}}}
""")
    config = ("--config", tmp_path / "run.yaml", "--ckpt_path", "best")
    refused = run_luve(capsys, "fit", *config)
    assert refused.code == 2
    assert "ckpt_path: fit resumes a run where it stopped" in refused.error_lines[-1]
    missing = run_luve(capsys, "test", *config)
    assert missing.code == 2
    assert f"ckpt_path: no best checkpoint in {tmp_path}/checkpoints" in missing.error_lines[-1]
    assert run_luve(capsys, "fit", "--config", tmp_path / "run.yaml").code == 0
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"not this one")
    outcome = run_luve(capsys, "test", *config)
    assert outcome.code == 0, outcome.err


class Broken(Graded):
    """Exports half of itself and fails."""

    def export(self, folder: Path, datamodule: Any) -> None:
        super().export(folder, datamodule)
        raise KeyError("a bug")


def test_an_export_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", steps=2, callbacks=(Export(tmp_path / "out"),))
    train(run, Graded([]))
    before = (tmp_path / "out" / "weights.pt").read_bytes()
    with pytest.raises(KeyError, match="a bug"):
        train(run.with_(steps=3), Broken([]))
    assert (tmp_path / "out" / "weights.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_a_run_folder_may_be_the_output(tmp_path: Path) -> None:
    for steps in (2, 3):
        export = Export(tmp_path)
        train(Run(tmp_path, steps=steps, callbacks=(export,)), Graded([]))
        assert export.written == [tmp_path / "weights.pt"]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoints", "final.pt", "journal-0.jsonl", "weights.pt"]


def test_a_file_in_the_place_of_the_output_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    run = Run(tmp_path / "run", steps=2, callbacks=(Export(tmp_path / "out"),))
    with pytest.raises(ValueError, match=r"output: .*out is a file; expected a folder"):
        train(run, Graded([]))
    assert not run.last.exists()
    assert (tmp_path / "out").read_text() == "mine"
