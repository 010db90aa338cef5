"""SIGTERM while a Trainer predicts."""

from __future__ import annotations

import signal
import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import lightning as L
import pytest

from luve_lightning.__main__ import main
from luve_lightning.callbacks.graceful_stop import StopPredictionOnSigterm
from luve_lightning.data.latent_store import LatentStore
from tests.helpers.precompute_run import PrecomputeRun, keys_of_last_clip, wait_for_entries
from tests.helpers.small_world import write_world
from tests.helpers.tiny import TinyModule


@pytest.mark.slow
def test_sigterm_ends_a_prediction_with_its_code_and_leaves_nothing_half_done(
    tmp_path: Path, tiny_backbone: Path
) -> None:
    world, store = write_world(tmp_path, 2), LatentStore(tmp_path / "store")
    with ExitStack() as claims:
        for key in keys_of_last_clip(tiny_backbone, world):
            assert claims.enter_context(store.claim(key))
        run = PrecomputeRun(tmp_path, tiny_backbone, world, store.root)
        wait_for_entries(store, 4, run)
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(30) == 128 + signal.SIGTERM, run.text()
    assert store.size().unfinished == 0
    assert "Traceback" not in run.text()


class Finalised:
    """Its end is when the signal comes."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def end_one_with_a_method() -> None:
    Finalised()


def end_one_that_is_watched() -> None:
    watched = Numbers()
    watch = weakref.ref(watched, lambda _: signal.raise_signal(signal.SIGTERM))
    del watched
    assert watch() is None


class Numbers(L.LightningModule):
    """Predicts and measures nothing; the signal comes in the second batch."""

    def __init__(self, end: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.end = end
        self.seen: list[int] = []

    def predict_step(self, batch: int, batch_idx: int) -> None:
        self.seen.append(batch_idx)
        if batch_idx == 1 and self.end is not None:
            self.end()

    def test_step(self, batch: int, batch_idx: int) -> None:
        self.predict_step(batch, batch_idx)

    def validation_step(self, batch: int, batch_idx: int) -> None:
        self.predict_step(batch, batch_idx)


@pytest.mark.parametrize("end", [end_one_with_a_method, end_one_that_is_watched])
def test_a_signal_while_something_is_finalised_ends_it_at_the_next_batch(
    end: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, task = signal.getsignal(signal.SIGTERM), Numbers(end)
    dropped: list[object] = []
    hook = dropped.append
    monkeypatch.setattr(sys, "unraisablehook", hook)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
        callbacks=[StopPredictionOnSigterm()],
    )  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        trainer.predict(task, list(range(5)))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert task.seen == [0, 1]
    assert (
        dropped == []
    )  # Python drops it in a callback of a weak reference, where no frame tells, and would print it
    assert sys.unraisablehook is hook
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("verb", ["predict", "test", "validate"])
def test_every_verb_ends_with_the_signals_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Through the command line: without a status of its own, a stopped measurement would look like a whole one."""
    before, seen = signal.getsignal(signal.SIGTERM), []

    def step(self: object, batch: object, batch_idx: int) -> None:
        seen.append(batch_idx)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(TinyModule, f"{'validation' if verb == 'validate' else verb}_step", step)
    (tmp_path / "run.yaml").write_text(f"""
trainer: {{default_root_dir: {tmp_path}, accelerator: cpu, enable_progress_bar: false}}
model: {{class_path: tests.helpers.tiny.TinyModule}}
data: {{class_path: tests.helpers.tiny.TinyData}}
""")
    assert main([verb, "--config", str(tmp_path / "run.yaml")]) == 143
    assert seen == [0]
    assert signal.getsignal(signal.SIGTERM) is before


def test_fit_without_a_graceful_stop_does_not_look_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        TinyModule, "on_train_batch_end", lambda *_: signal.raise_signal(signal.SIGTERM), raising=False
    )
    (tmp_path / "run.yaml").write_text(f"""
trainer:
  {{default_root_dir: {tmp_path}, accelerator: cpu, enable_progress_bar: false, max_steps: 5,
  enable_checkpointing: false}}
model: {{class_path: tests.helpers.tiny.TinyModule}}
data: {{class_path: tests.helpers.tiny.TinyData}}
""")
    assert main(["fit", "--config", str(tmp_path / "run.yaml")]) == 143
