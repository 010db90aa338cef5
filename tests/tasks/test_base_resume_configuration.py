"""A resumed run does what its own configuration says, and tells what that changed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from luve_lightning.callbacks import StopRequested
from luve_lightning.datamodules.latent_pairs import LatentPairsDataModule
from luve_lightning.losses import LatentL1, Loss, PixelL1
from luve_lightning.models.vluer import VLUer
from luve_lightning.tasks import VLUerTask
from tests.helpers.resumable import CropsTask, Run, SendSignal, train

AT = 4  # steps of the first run


class Tuned(CropsTask):
    """The task with other values of the optimiser and its schedule."""

    def __init__(self, **values: Any) -> None:
        super().__init__()
        for name, value in values.items():
            assert hasattr(self, name)
            setattr(self, name, value)


class Groups(L.Callback):
    """The optimiser's settings at the first step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if not self.seen:
            groups = trainer.optimizers[0].param_groups
            self.seen = [{k: v for k, v in group.items() if k != "params"} for group in groups]


def stopped(folder: Path, **options: Any) -> Run:
    """A run that was stopped after AT steps."""
    run = Run(folder, steps=12, **options)
    with pytest.raises(StopRequested):
        train(run.with_(callbacks=(*run.callbacks, SendSignal("SIGTERM", AT - 1))))
    return run.with_(resume="last")


def edited(run: Run, edit: Any) -> Run:
    """Change what is in the run's checkpoint."""
    checkpoint = torch.load(run.last, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, run.last)
    return run


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if message.startswith("resuming with")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "steps", "line"),
    [
        ({}, 12, None),
        ({"lr": 1e-3}, 12, "lr 0.001 (the checkpoint had 0.01)"),
        ({"lr": 2e-1}, 12, "lr 0.2 (the checkpoint had 0.01)"),
        ({"min_lr": 5e-3}, 12, "min_lr 0.005 (the checkpoint had 0.0001)"),
        ({"warmup_steps": 8}, 12, "warmup_steps 8 (the checkpoint had 3)"),
        ({"weight_decay": 0.0}, 12, "weight_decay 0 (the checkpoint had 0.1)"),
        ({}, 15, "steps 15 (the checkpoint had 12)"),
        (
            {"lr": 1e-3, "warmup_steps": 0},
            12,
            "lr 0.001 (the checkpoint had 0.01), warmup_steps 0 (the checkpoint had 3)",
        ),
    ],
)
def test_the_schedule_is_the_new_configurations(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, values: dict[str, Any], steps: int, line: str | None
) -> None:
    run, groups, task = stopped(tmp_path), Groups(), Tuned(**values)
    with caplog.at_level(logging.INFO):
        train(run.with_(steps=steps, callbacks=(groups,)), task)
    used = [group["lr"] for group in groups.seen] + [entry[-1] for entry in run.trained()[AT:]]
    expected = [task.learning_rate(step, steps) for step in (AT, *range(AT, steps + 1))]
    assert used == pytest.approx(expected, rel=1e-12)
    assert [group["initial_lr"] for group in groups.seen] == [task.lr] * 2
    assert [group["weight_decay"] for group in groups.seen] == [task.weight_decay, 0.0]
    assert said(caplog) == ([] if line is None else [f"resuming with {line}"])


def test_settings_of_the_optimiser_are_not_the_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As after a change of the code: the configuration has no key for these."""

    def edit(checkpoint: dict[str, Any]) -> None:
        del checkpoint["schedule"]  # of an earlier version
        for group in checkpoint["optimizer_states"][0]["param_groups"]:
            group |= {"betas": (0.5, 0.6), "eps": 1e-3, "initial_lr": 1.0, "lr": 1.0}
        checkpoint["lr_schedulers"][0]["base_lrs"] = [1.0, 1.0]

    run, groups = edited(stopped(tmp_path), edit), Groups()
    with caplog.at_level(logging.INFO):
        train(run.with_(callbacks=(groups,)))
    assert [group["betas"] for group in groups.seen] == [(0.9, 0.99)] * 2
    assert [group["eps"] for group in groups.seen] == [1e-8] * 2
    expected = [CropsTask().learning_rate(step, 12) for step in range(1, 13)]
    assert [entry[-1] for entry in run.trained()] == pytest.approx(expected, rel=1e-12)
    [line] = said(caplog)
    assert "betas (0.9, 0.99) (the checkpoint had (0.5, 0.6))" in line
    assert "lr 0.01 (the checkpoint had 1)" in line


def test_the_same_settings_as_a_list_are_no_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As sharded checkpoints give them back."""

    def edit(checkpoint: dict[str, Any]) -> None:
        for group in checkpoint["optimizer_states"][0]["param_groups"]:
            group["betas"] = list(group["betas"])

    run = edited(stopped(tmp_path), edit)
    with caplog.at_level(logging.INFO):
        train(run)
    assert said(caplog) == []


def test_settings_of_callbacks_are_not_the_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def stopper(patience: int) -> EarlyStopping:
        return EarlyStopping("val/error", patience=patience)

    validate = {"limit_val_batches": 1, "val_check_interval": 2}
    run, later = stopped(tmp_path, callbacks=(stopper(50),), trainer=validate), stopper(99)
    with caplog.at_level(logging.INFO):
        train(run.with_(callbacks=(later,)))
    assert later.patience == 99
    assert said(caplog) == ["resuming with EarlyStopping.patience 99 (the checkpoint had 50)"]


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("loops", "the step"),
        ("lr_schedulers", "the schedule's state"),
        ("optimizer_states", "the optimiser's state"),
        ("moments", "the optimiser's moments"),
    ],
)
def test_weights_alone_are_not_resumed(tmp_path: Path, key: str, what: str) -> None:
    def edit(checkpoint: dict[str, Any]) -> None:
        if key == "moments":
            checkpoint["optimizer_states"][0]["state"] = {}
        else:
            del checkpoint[key]

    run = edited(stopped(tmp_path), edit)
    with pytest.raises(ValueError, match=rf"{run.last} cannot be resumed: it lacks {what}; expected a last\.ckpt"):
        train(run)


def test_what_else_is_missing_is_told(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    def edit(checkpoint: dict[str, Any]) -> None:
        for key in ("callbacks", "CropsDataModule", "random_state"):
            del checkpoint[key]

    train(edited(stopped(tmp_path), edit))
    told = [str(warning.message) for warning in recwarn if "the checkpoint has no" in str(warning.message)]
    assert told == [
        "the checkpoint has no state of EMA, Checkpoints, CropsDataModule: it starts afresh",
        "the checkpoint has no random state: random numbers start afresh",
    ]


class Logged(L.Callback):
    """What each step logged."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_losses_their_weights_and_phases_are_the_new_configurations(
    tmp_path: Path, tiny_backbone: Path, tiny_clips: Path, tiny_latents: Path
) -> None:
    def fit(run: Run, losses: dict[str, Loss], pixel_from_step: int, crop: tuple[int, int, int]) -> VLUerTask:
        data = LatentPairsDataModule(
            tiny_clips / "clips.csv", tiny_latents, str(tiny_backbone), (48, 48), [2.0], 9, crop=(3, 6, 6),
            batch_size=1, passes=4,
        )  # fmt: skip
        net = VLUer(channels=8, pairs=1, hidden=8, layers=1, query_channels=8, decoder_layers=1)
        task = VLUerTask(net, str(tiny_backbone), losses, pixel_from_step=pixel_from_step, pixel_crop=crop, lr=1e-3)
        train(run, task, data)
        return task

    run = Run(tmp_path, steps=2)
    fit(run, {"latent": LatentL1()}, -1, (2, 3, 3))
    logged = Logged()
    losses: dict[str, Loss] = {"latent": LatentL1(weight=0.25), "pixel": PixelL1(weight=3.0)}
    task = fit(run.with_(resume="last", steps=4, callbacks=(logged,)), losses, 3, (1, 2, 2))
    assert [step["train/phase"] for step in logged.seen] == [1.0, 2.0]
    assert logged.seen[0]["train/loss"] == pytest.approx(0.25 * logged.seen[0]["train/latent"])
    both = 0.25 * logged.seen[1]["train/latent"] + 3 * logged.seen[1]["train/pixel"]
    assert logged.seen[1]["train/loss"] == pytest.approx(both)
    assert [window.stop - window.start for window in task.crop_window((3, 6, 6), 3)] == [1, 2, 2]
