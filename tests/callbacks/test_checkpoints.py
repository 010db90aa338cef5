"""Which files a run leaves, and what is in them."""

from __future__ import annotations

import shutil
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, timer
from lightning.pytorch.loggers import CSVLogger

from luve_lightning.callbacks import AtomicCheckpointIO, Checkpoints
from tests.helpers.processes import run_processes
from tests.helpers.resumable import CropsDataModule, CropsTask, Run, SendSignal, train


def load(path: Path) -> dict[str, Any]:
    return AtomicCheckpointIO().load_checkpoint(path)


class Written(L.Callback):
    """The optimiser step and micro-batch of every checkpoint, as it is made."""

    def __init__(self) -> None:
        self.at: list[tuple[int, int]] = []

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.at.append((trainer.global_step, trainer.fit_loop.total_batch_idx + 1))


class Scores(CropsTask):
    """Logs the given scores, one a validation."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = list(scores)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val/error", self.scores.pop(0))


def test_last_is_written_every_few_steps_and_at_the_end(tmp_path: Path) -> None:
    written = Written()
    run = Run(tmp_path, steps=11, every_n_steps=4, callbacks=(written,))
    train(run)
    assert [step for step, _ in written.at] == [4, 8, 11]
    assert [p.name for p in run.last.parent.iterdir()] == ["last.ckpt"]
    assert load(run.last)["global_step"] == 11


def test_the_last_batch_of_the_last_epoch_counts_as_the_end(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=-1, every_n_steps=100, trainer={"max_epochs": 2})
    train(run)
    assert load(run.last)["global_step"] == 12


def test_nothing_is_written_between_optimiser_steps_even_after_a_resume(tmp_path: Path) -> None:
    first, second = Written(), Written()
    run = Run(tmp_path, steps=9, accumulate=3, every_n_steps=2, callbacks=(first, SendSignal("SIGTERM", 3)))
    with pytest.raises(SystemExit):
        train(run)
    train(run.with_(resume="last", callbacks=(second,)))
    assert first.at == [(2, 6), (4, 12)]
    assert second.at == [(6, 18), (8, 24), (9, 27)]


def test_the_best_are_ranked_by_the_score_of_their_own_step(tmp_path: Path) -> None:
    written = Written()
    run = Run(
        tmp_path, steps=12, every_n_steps=2, monitor="val/error", callbacks=(written,),
        trainer={"limit_val_batches": 1, "val_check_interval": 3},
    )  # fmt: skip
    train(run, Scores([0.5, 0.2, 0.9, 0.3]))
    assert sorted(p.name for p in run.last.parent.iterdir()) == ["best-step=6.ckpt", "last.ckpt"]
    assert load(run.last.with_name("best-step=6.ckpt"))["global_step"] == 6
    # Before each validation, and after it so that the ranking is in it; else every two steps.
    assert [s for s, _ in written.at] == [2, 3, 3, 3, 4, 6, 6, 6, 8, 9, 9, 10, 12, 12]
    [state] = [v for k, v in load(run.last)["callbacks"].items() if k.startswith("Checkpoints")]
    assert state["best_model_path"].endswith("best-step=6.ckpt")
    assert float(state["best_model_score"]) == pytest.approx(0.2)


def test_several_best_are_kept(tmp_path: Path) -> None:
    saver = Checkpoints(100, "val/error", "max", save_top_k=2)
    trainer = L.Trainer(
        default_root_dir=tmp_path, max_steps=8, accelerator="cpu", logger=False, enable_progress_bar=False,
        num_sanity_val_steps=0, limit_val_batches=1, val_check_interval=2, callbacks=saver,
    )  # fmt: skip
    trainer.fit(Scores([1.0, 4.0, 3.0, 2.0]), CropsDataModule())
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["best-step=4.ckpt", "best-step=6.ckpt", "last.ckpt"]


def test_a_metric_that_is_not_logged_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=2, monitor="val/psnr", trainer={"limit_val_batches": 1, "val_check_interval": 2})
    with pytest.raises(ValueError, match=r"validation logs no 'val/psnr'; it logs: train/loss, val/error$"):
        train(run)


def test_last_is_found_beside_a_logger_and_one_run_has_one_folder(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=4, every_n_steps=2, callbacks=(SendSignal("SIGTERM", 1),))
    with pytest.raises(SystemExit):
        train(run.with_(trainer={"logger": CSVLogger(tmp_path, "logs"), "log_every_n_steps": 1}))
    trainer = train(run.with_(resume="last", callbacks=(), trainer={"logger": CSVLogger(tmp_path, "logs")}))
    assert trainer.ckpt_path == str(run.last)
    assert len(run.trained()) == 4
    assert [p.name for p in run.last.parent.iterdir()] == ["last.ckpt"]


class Exported(L.Callback):
    """Stands for whatever is done when training has ended."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        (Path(trainer.default_root_dir) / "exported").touch()


@pytest.mark.slow
def test_max_time_saves_exports_and_can_be_prolonged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count(0.0, 0.1)  # a tenth of a second for each look: a step takes as long on every machine
    monkeypatch.setattr(timer, "time", SimpleNamespace(monotonic=clock.__next__))
    run = Run(
        tmp_path, steps=1_000_000, accumulate=2, every_n_steps=1_000_000, callbacks=(Exported(),),
        trainer={"max_time": {"seconds": 1}, "limit_val_batches": 1, "val_check_interval": 6},
    )  # fmt: skip
    trainer = train(run)
    steps = trainer.global_step
    assert 0 < steps == load(run.last)["global_step"] == len(run.trained()) / 2
    assert (tmp_path / "exported").exists()
    trainer = train(run.with_(resume="last", trainer={**run.trainer, "max_time": {"seconds": 2}}))
    assert trainer.global_step > steps
    positions = [entry[1] * 6 + entry[2] for entry in run.trained()]
    assert positions == list(range(2 * trainer.global_step))  # nothing twice, nothing left out


def test_early_stopping_saves_too(tmp_path: Path) -> None:
    stopper = EarlyStopping("val/error", mode="min", patience=1)
    run = Run(
        tmp_path, steps=100, monitor="val/error", every_n_steps=1000, callbacks=(stopper,),
        trainer={"limit_val_batches": 1, "val_check_interval": 2},
    )  # fmt: skip
    trainer = train(run, Scores([1.0, 2.0, 3.0]))
    assert trainer.global_step == load(run.last)["global_step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("length", [{"steps": 9}, {"steps": -1}])
def test_the_validation_after_the_last_step_is_made_up(
    tmp_path: Path, signal_name: str, length: dict[str, int]
) -> None:
    """Lightning returns at once from a run whose steps are all taken; `best` would stay an earlier one."""
    trainer = {"limit_val_batches": 3, "val_check_interval": 3}
    trainer |= {"max_epochs": 2} if length["steps"] < 0 else {}
    last = 9 if length["steps"] > 0 else 12
    whole = Run(tmp_path / "whole", monitor="val/error", trainer=trainer, **length)
    stop = SendSignal(signal_name, last, in_validation=True)
    run = whole.with_(folder=tmp_path / "stopped", callbacks=(stop,))
    statuses = [run_processes(whole), run_processes(run)]
    assert statuses == [[0], [143 if signal_name == "SIGTERM" else -9]]
    assert callback_state(run)["validation_due"]
    assert run.journal() == whole.journal()[:-1]
    for _ in range(2):  # the second finds nothing to do
        assert run_processes(run.with_(resume="last", callbacks=())) == [0]
        assert run.journal() == whole.journal()
        states = [callback_state(which) for which in (run, whole)]
        for state in states:
            state["best_k_models"] = {Path(k).name: float(v) for k, v in state["best_k_models"].items()}
            for key in ("dirpath", "best_model_path", "last_model_path", "kth_best_model_path"):
                state[key] = Path(state[key]).name
        assert states[0] == states[1]
        assert names(run) == names(whole)


def callback_state(run: Run) -> dict[str, Any]:
    [state] = [v for k, v in load(run.last)["callbacks"].items() if k.startswith("Checkpoints")]
    return dict(state)


def names(run: Run) -> list[str]:
    return sorted(path.name for path in run.last.parent.iterdir())


def test_a_prolonged_run_goes_on_after_a_validation_that_was_made_up(tmp_path: Path) -> None:
    options: dict[str, Any] = {"monitor": "val/error", "trainer": {"limit_val_batches": 3, "val_check_interval": 3}}
    whole = Run(tmp_path / "whole", steps=15, **options)
    train(whole)
    run = Run(tmp_path / "run", steps=9, **options)
    with pytest.raises(SystemExit):
        train(run.with_(callbacks=(SendSignal("SIGTERM", 9, in_validation=True),)))
    train(run.with_(resume="last"))
    train(run.with_(resume="last", steps=15))

    assert [entry[:-1] for entry in run.trained()] == [entry[:-1] for entry in whole.trained()]
    assert [entry[0] for entry in run.journal()] == [entry[0] for entry in whole.journal()]


class TwoMetrics(CropsTask):
    """Logs a second metric."""

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val/other", -batch[0].mean())


def test_another_metric_or_fewer_best_on_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = {"limit_val_batches": 1, "val_check_interval": 3}
    run = Run(tmp_path, steps=9, monitor="val/error", trainer=trainer)
    with pytest.raises(SystemExit):
        train(run.with_(callbacks=(SendSignal("SIGTERM", 3, in_validation=True),)))
    with caplog.at_level("INFO"):
        train(run.with_(resume="last", monitor="val/other"), TwoMetrics())
    assert "resuming with monitor val/other, mode min (the checkpoint had another): the best" in caplog.text
    assert len([entry for entry in run.journal() if entry[0] == "val"]) == 3  # that of step 3 was made up
    saver = Checkpoints(100, "val/error", "max", save_top_k=3, folder=tmp_path / "x")
    scores = {str(tmp_path / "x" / f"best-step={n}.ckpt"): torch.tensor(float(n)) for n in (1, 2, 3)}
    saver.best_k_models = dict(scores)
    smaller = Checkpoints(100, "val/error", "max", save_top_k=2, folder=tmp_path / "x")
    smaller.load_state_dict(saver.state_dict())
    assert smaller.best_k_models == {path: score for path, score in scores.items() if score > 1}
    assert (smaller.kth_best_model_path, float(smaller.kth_value)) == (list(scores)[1], 2.0)


def test_fast_dev_run_leaves_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, trainer={"fast_dev_run": 2, "limit_val_batches": 1})
    train(run)
    assert not run.last.parent.exists()


@pytest.mark.slow
def test_two_processes_write_one_file(tmp_path: Path) -> None:
    run = Run(
        tmp_path, steps=4, every_n_steps=2, processes=2, monitor="val/error",
        trainer={"limit_val_batches": 1.0, "val_check_interval": 3},
    )  # fmt: skip
    assert run_processes(run) == [0, 0]
    assert sorted(p.name for p in run.last.parent.iterdir()) == ["best-step=3.ckpt", "last.ckpt"]


def test_every_n_steps_must_be_positive() -> None:
    with pytest.raises(ValueError, match="every_n_steps must be >= 1, got 0"):
        Checkpoints(0)


@pytest.mark.parametrize("copied", [False, True])
def test_the_best_stays_the_best_when_the_run_folder_is_moved(tmp_path: Path, copied: bool) -> None:
    options = {"limit_val_batches": 1, "val_check_interval": 3}
    run = Run(tmp_path / "before", steps=6, monitor="val/error", trainer=options)
    train(run, Scores([0.2, 0.5]))
    if copied:
        shutil.copytree(run.folder, tmp_path / "after")
    else:
        run.folder.rename(tmp_path / "after")
    moved = run.with_(folder=tmp_path / "after", steps=12, resume="last")
    train(moved, Scores([0.4, 0.1] if copied else [0.4, 0.3]))
    best = "best-step=12.ckpt" if copied else "best-step=3.ckpt"
    assert sorted(p.name for p in moved.last.parent.iterdir()) == [best, "last.ckpt"]
    if copied:
        assert run.last.with_name("best-step=3.ckpt").exists()


def test_the_best_is_chosen_anew_when_the_checkpoint_alone_was_copied(tmp_path: Path) -> None:
    options = {"limit_val_batches": 1, "val_check_interval": 3}
    run = Run(tmp_path / "before", steps=6, monitor="val/error", trainer=options)
    train(run, Scores([0.2, 0.5]))
    alone = run.with_(folder=tmp_path / "after", steps=12, resume="last")
    alone.last.parent.mkdir(parents=True)
    shutil.copy(run.last, alone.last)
    with pytest.warns(UserWarning, match="dirpath has changed"):
        train(alone, Scores([0.4, 0.3]))
    assert sorted(p.name for p in alone.last.parent.iterdir()) == ["best-step=12.ckpt", "last.ckpt"]
