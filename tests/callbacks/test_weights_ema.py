"""The average of the weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from luve_lightning.callbacks import EMA, AtomicCheckpointIO
from luve_lightning.callbacks.weights import averaged_weights
from tests.helpers.resumable import CropsDataModule, CropsTask, Run, difference, train

VALIDATE = {"limit_val_batches": 1, "val_check_interval": 3}


def trainable(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def ema_of(trainer: L.Trainer) -> EMA:
    return next(c for c in trainer.callbacks if isinstance(c, EMA))  # type: ignore[attr-defined]


class Recorder(L.Callback):
    """The weights at the start, after each optimiser step, and inside each validation."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.saved: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.steps.append(trainable(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == len(self.steps):
            self.steps.append(trainable(pl_module))

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.validated.append(trainable(pl_module))
        path = Path(trainer.default_root_dir) / "within.ckpt"
        if trainer.state.fn == "fit":
            trainer.save_checkpoint(path)
            self.saved.append(AtomicCheckpointIO().load_checkpoint(path)["state_dict"])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.after.append(trainable(pl_module))


def reference(steps: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The average of the weights after each step, written out."""
    average = {name: w.double() for name, w in steps[0].items()}
    for n, weights in enumerate(steps[1:], start=1):
        d = min(decay, (1 + n) / (10 + n))
        average = {name: d * average[name] + (1 - d) * w.double() for name, w in weights.items()}
    return average


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_the_average_of_the_steps_taken(tmp_path: Path, accumulate: int) -> None:
    recorder = Recorder()
    trainer = train(Run(tmp_path, steps=9, accumulate=accumulate, callbacks=(recorder,)))
    ema = ema_of(trainer)
    assert ema.updates == 9 == len(recorder.steps) - 1
    expected = reference(recorder.steps, ema.decay)
    assert ema.average.keys() == expected.keys() == {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias",
                                                     "net.3.weight", "net.3.bias"}  # fmt: skip
    for name, value in expected.items():
        torch.testing.assert_close(ema.average[name].double(), value, rtol=0, atol=1e-6)
    assert difference(ema.average, recorder.steps[-1]) is not None


def test_validation_sees_the_average_and_training_does_not(tmp_path: Path) -> None:
    recorder = Recorder()
    ema = ema_of(train(Run(tmp_path, steps=6, trainer=VALIDATE, callbacks=(recorder,))))
    first, second = recorder.validated
    for seen, steps in ((first, recorder.steps[:4]), (second, recorder.steps)):
        for name, value in reference(steps, ema.decay).items():
            torch.testing.assert_close(seen[name].double(), value, rtol=0, atol=1e-6)
    assert difference(recorder.after, [recorder.steps[3], recorder.steps[6]]) is None
    # A checkpoint made while the average is in place holds the weights all the same.
    for saved, step in zip(recorder.saved, (3, 6), strict=True):
        assert difference({name: saved[name] for name in first}, recorder.steps[step]) is None


class Broken(CropsTask):
    """Fails in its second validation."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.global_step == 6:
            raise ArithmeticError("in validation")


def test_a_validation_that_fails_leaves_the_weights(tmp_path: Path) -> None:
    recorder, task = Recorder(), Broken()
    with pytest.raises(ArithmeticError):
        train(Run(tmp_path, trainer=VALIDATE, callbacks=(recorder,)), task)
    assert difference(trainable(task), recorder.steps[6]) is None


def test_a_checkpoint_is_validated_and_tested_with_its_average(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=4)
    trainer = train(run)
    average, recorder, task = ema_of(trainer).average, Recorder(), CropsTask()
    other = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False,
        limit_val_batches=1, callbacks=[EMA(0.9), recorder], plugins=AtomicCheckpointIO(),
    )  # fmt: skip
    other.validate(task, CropsDataModule(), ckpt_path=str(run.last), verbose=False)
    assert difference(recorder.validated, [average]) is None
    assert difference(trainable(task), trainable(trainer.lightning_module)) is None
    with averaged_weights(other, task):
        assert difference(trainable(task), average) is None
        with averaged_weights(other, task):  # nested, as a callback inside a validation would
            assert difference(trainable(task), average) is None
        assert difference(trainable(task), average) is None
    assert difference(trainable(task), trainable(trainer.lightning_module)) is None


def test_a_resumed_average_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=4)
    before = {k: v.clone() for k, v in ema_of(train(run)).average.items()}
    recorder = Recorder()
    ema = ema_of(train(run.with_(steps=5, resume="last", callbacks=(recorder,))))
    assert ema.updates == 5
    weights = trainable(train(run.with_(steps=5, resume="last")).lightning_module)
    decay = min(0.9, 6 / 15)
    for name, value in before.items():
        torch.testing.assert_close(ema.average[name], torch.lerp(value, weights[name], 1 - decay))


def test_a_step_walks_through_no_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    ema, task = EMA(0.5), CropsTask()
    trainer: Any = SimpleNamespace(global_step=0)
    ema.on_train_start(trainer, task)
    before = trainable(task)
    for weight in task.parameters():
        weight.data += 1
    trainer.global_step = 1
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "named_modules", lambda *_, **__: pytest.fail("a walk"))
        ema.on_train_batch_end(trainer, task, None, None, 0)
    decay = 2 / 11  # of the first step
    for name, weight in before.items():
        torch.testing.assert_close(ema.average[name], weight + 1 - decay)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_has_limits(decay: float) -> None:
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got"):
        EMA(decay)
