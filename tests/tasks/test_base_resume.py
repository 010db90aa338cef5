"""A resumed run is the run that was never interrupted, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from luve_lightning.callbacks import AtomicCheckpointIO, StopRequested
from luve_lightning.callbacks.checkpoints import accumulating
from luve_lightning.datamodules.latent_pairs import LatentPairsDataModule
from luve_lightning.datamodules.sampling import ResumableBatchSampler, check_order
from luve_lightning.losses import FrameDifferenceL1, LatentL1, PixelL1
from luve_lightning.models.vluer import VLUer
from luve_lightning.tasks import VLUerTask
from tests.helpers.processes import run_processes
from tests.helpers.resumable import CropsDataModule, CropsTask, Run, SendSignal, difference, load_final, train

# An epoch has 6 batches. Names say when validation runs.
VALIDATE: dict[str, Any] = {"limit_val_batches": 3}
CASES: dict[str, dict[str, Any]] = {
    "steps": {"steps": 14},
    "epochs": {"steps": -1, "trainer": {"max_epochs": 3}},
    "accumulate_2": {"steps": 8, "accumulate": 2},
    "accumulate_4_of_6": {"steps": 5, "accumulate": 4},  # Lightning steps at the epoch's end, after 2
    "workers": {"steps": 14, "workers": 2},
    "validate_within_epochs": {"steps": 14, "trainer": {**VALIDATE, "val_check_interval": 4}},
    "validate_after_epochs": {"steps": -1, "trainer": {**VALIDATE, "max_epochs": 3}},
    "validate_by_steps": {
        "steps": 15,
        "trainer": {**VALIDATE, "val_check_interval": 4, "check_val_every_n_epoch": None},
    },
}


class KeepStates(L.Callback):
    """A copy of every checkpoint a run could leave: after each optimiser step and after each validation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        others = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._keep(trainer, "step")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._keep(trainer, "validated")

    def _keep(self, trainer: L.Trainer, what: str) -> None:
        if not accumulating(trainer):
            trainer.save_checkpoint(self.folder / f"{trainer.global_step:02d}-{what}.ckpt")


def validations(run: Run) -> list[Any]:
    return [entry for entry in run.journal() if entry[0] == "val"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_state_can_be_resumed(tmp_path: Path, case: str) -> None:
    whole = Run(tmp_path / "whole", **CASES[case])
    train(whole.with_(callbacks=(KeepStates(tmp_path / "states"),)))
    expected, total = load_final(whole), len(whole.trained())
    # Within the first epoch, at its end, at the start and within the second; and after each validation.
    states = sorted((tmp_path / "states").iterdir())[:-2]  # with at least one step to go
    steps = [s for s in states if s.stem.endswith("step")]
    epoch = max(1, 6 // whole.accumulate if 6 % whole.accumulate == 0 else 2)
    chosen = [steps[i] for i in sorted({0, epoch - 1, epoch, len(steps) - 1})]
    for state in chosen + [s for s in states if s not in steps]:
        run = whole.with_(folder=tmp_path / state.stem, resume=str(state))
        train(run)
        assert difference(load_final(run), expected) is None, state.stem
        assert 0 < len(run.trained()) < total
        assert run.trained() == whole.trained()[-len(run.trained()) :], state.stem
        assert validations(run) == validations(whole)[len(validations(whole)) - len(validations(run)) :]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stride", [1, 3])
def test_a_run_stopped_again_and_again(tmp_path: Path, case: str, stride: int) -> None:
    whole = Run(tmp_path / "whole", **CASES[case])
    steps = train(whole).global_step
    run = whole.with_(folder=tmp_path / "stopped", every_n_steps=100)
    for at in range(0, steps - 1, stride):  # a stop comes after the step at which it is asked for
        with pytest.raises(StopRequested):
            train(run.with_(resume="last", callbacks=(SendSignal("SIGTERM", at),)))
    train(run.with_(resume="last"))
    assert difference(load_final(run), load_final(whole)) is None
    # Nothing twice, nothing left out: a validation that a stop prevented is made up for.
    assert run.journal() == whole.journal()


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "workers", "accumulate"), [(1, 0, 2), (1, 2, 1), (2, 0, 1), (2, 2, 2)])
def test_kill_and_terminate_in_real_processes(tmp_path: Path, processes: int, workers: int, accumulate: int) -> None:
    whole = Run(
        tmp_path / "whole", steps=10, processes=processes, workers=workers, accumulate=accumulate, every_n_steps=3
    )  # fmt: skip
    assert run_processes(whole) == [0] * processes
    others = [0] * (processes - 1)
    for name, kept, statuses in (("SIGKILL", 6, [-9] * processes), ("SIGTERM", 8, [143, *others])):
        run = whole.with_(folder=tmp_path / name)
        assert run_processes(run.with_(callbacks=(SendSignal(name, 7),))) == statuses
        saved = AtomicCheckpointIO().load_checkpoint(run.last)
        assert saved["global_step"] == kept
        batches = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
        before = [len(run.trained(rank)) for rank in range(processes)]
        assert run_processes(run.with_(resume="last")) == [0] * processes
        assert difference(load_final(run), load_final(whole)) is None
        for rank in range(processes):
            assert run.trained(rank)[before[rank] :] == whole.trained(rank)[batches:]


# As the released configuration trains: sizes at low resolution, first frames, the clip's own pixels.
RELEASED = {"crop": (3, 2, 2), "crop_at": "low", "crop_frames": "first", "video_crop": (2, 2, 2)}


def vluer_task(backbone: Path) -> VLUerTask:
    return VLUerTask(
        VLUer(channels=8, pairs=1, hidden=8, layers=1, query_channels=8, decoder_layers=1),
        str(backbone),
        {"latent": LatentL1(), "pixel": PixelL1(), "frame": FrameDifferenceL1()},
        pixel_from_step=3,
        pixel_crop=(2, 3, 3),
        lr=1e-3,
    )


class Phases(L.Callback):
    """The phase of each micro-batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.seen.append(float(trainer.callback_metrics["train/phase"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop_at", "crops"), [(1, {"crop": (3, 6, 6)}), (2, {"crop": (3, 6, 6)}), (4, {"crop": (3, 6, 6)}), (4, RELEASED)]
)
def test_the_vluer_across_the_change_of_phase(
    tmp_path: Path, tiny_backbone: Path, tiny_clips: Path, tiny_latents: Path, stop_at: int, crops: dict[str, Any]
) -> None:
    def fit(run: Run) -> None:
        data = LatentPairsDataModule(
            tiny_clips / "clips.csv", tiny_latents, str(tiny_backbone), (48, 48), [1.5, 2.0, 3.0], 9,
            batch_size=1, passes=2, seed=1, val_limit=1, **crops,
        )  # fmt: skip
        L.seed_everything(0, verbose=False)
        train(run, vluer_task(tiny_backbone), data)

    phases = Phases()
    whole = Run(tmp_path / "whole", steps=6, accumulate=2, every_n_steps=100, callbacks=(phases,))
    fit(whole)
    assert phases.seen == [1.0] * 6 + [2.0] * 6
    run = whole.with_(folder=tmp_path / "stopped")
    with pytest.raises(StopRequested):
        fit(run.with_(callbacks=(Phases(), SendSignal("SIGTERM", stop_at))))
    saved = AtomicCheckpointIO().load_checkpoint(run.last)
    assert saved["global_step"] == stop_at + 1
    assert all(name.startswith("net.") for name in saved["state_dict"])  # not the frozen VAE
    fit(run.with_(resume="last", callbacks=(Phases(),)))
    assert difference(load_final(run), load_final(whole)) is None
    assert run.trained() == whole.trained()


@pytest.mark.parametrize("changed", ["batch_size", "passes"])
def test_an_order_that_cannot_be_continued_is_refused(tmp_path: Path, changed: str) -> None:
    run = Run(tmp_path, steps=4, every_n_steps=2)
    train(run)
    message = rf"4 batches into epoch 0 of another order of the data \({changed} was \d, is 3\): resume with"
    with pytest.raises(ValueError, match=message):
        train(run.with_(resume="last", steps=6), data=CropsDataModule(**{changed: 3}))


def test_at_an_epochs_end_the_order_may_change(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=6)
    train(run)
    trainer = train(run.with_(resume="last", steps=8), data=CropsDataModule(batch_size=4))
    assert trainer.global_step == 8
    assert [len(entry[3]) for entry in run.trained()] == [2] * 6 + [4] * 2


@pytest.mark.slow
def test_another_number_of_processes_is_refused_in_an_epoch_and_goes_on_at_its_end(tmp_path: Path) -> None:
    """Two processes; then one, and three as far as their order of the data decides."""
    run = Run(tmp_path / "two", steps=3, processes=2, callbacks=(KeepStates(tmp_path / "states"),))
    assert run_processes(run) == [0, 0]
    within, ended = sorted((tmp_path / "states").glob("0[23]-step.ckpt"))
    one = run.with_(folder=tmp_path / "one", processes=1, steps=5, callbacks=())
    with pytest.raises(
        ValueError, match=r"2 batches into epoch 0 of another order of the data \(processes was 2, is 1\)"
    ):
        train(one.with_(resume=str(within)))
    three = ResumableBatchSampler(12, 2, seed=3, kind_weights=(1.0, 2.0), rank=0, world_size=3)
    states = [AtomicCheckpointIO().load_checkpoint(state)["CropsDataModule"] for state in (within, ended)]
    with pytest.raises(ValueError, match=r"\(processes was 2, is 3\): resume with the same values"):
        check_order(states[0], three)
    check_order(states[1], three)
    with pytest.warns(UserWarning, match=r"2 process\(es\), this run has 1: random numbers start afresh"):
        train(one.with_(resume=str(ended)))
    # Epoch 1 as one process takes it that was there from the beginning.
    alone = run.with_(folder=tmp_path / "alone", processes=1, steps=8, callbacks=())
    train(alone)
    taken = [[(entry[1], *entry[3:5]) for entry in run.trained()] for run in (one, alone)]
    assert taken[0] == taken[1][6:]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=2)
    train(run)
    other = CropsTask()
    other.net.append(other.net[3])
    with pytest.raises(ValueError, match=r"does not fit CropsTask: 2 weights missing \(net.4.bias, net.4.weight\)"):
        train(run.with_(resume="last"), other)


def test_last_without_a_checkpoint_starts_anew(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=2, resume="last")
    train(run)
    shutil.rmtree(run.last.parent)
    train(run)
    assert run.trained()[:2] == run.trained()[2:]
