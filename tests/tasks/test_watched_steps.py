"""What a Trainer is told to be doing before its first step."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning as L
import pytest
import torch

from luve_lightning.tasks.watched_steps import Preparing, idle_step
from luve_lightning.terminal import Phases
from tests.helpers.tiny import TinyData, TinyModule


class Told(Phases):
    """Remembers the phases in their order."""

    def __init__(self) -> None:
        super().__init__(lambda line: None, after=3600)
        self.phases: list[str] = []

    def begin(self, what: str) -> None:
        super().begin(what)
        self.phases.append(what)

    def close(self, what: str) -> None:
        super().close(what)
        self.phases.append(what)


@pytest.mark.parametrize(("compiled", "first"), [(True, "compiling the blocks (first step)"), (False, "first step")])
def test_what_happens_before_the_first_step_is_told_in_order(tmp_path: Path, compiled: bool, first: str) -> None:
    module, told = TinyModule(), Told()
    if compiled:
        module.layer.compile(backend="eager")
    trainer = L.Trainer(max_steps=2, accelerator="cpu", logger=False, default_root_dir=tmp_path, num_sanity_val_steps=1)
    trainer.profiler = profiler = Preparing(trainer, told)
    profiler.begin()
    trainer.fit(module, TinyData())
    assert told.phases == [
        "setting up", "starting the loggers", "looking up clips, latents and captions", "setting up callbacks",
        "moving the model to cpu", "loading the first batch", first, "first step done",
    ]  # fmt: skip


def test_a_measurement_is_told_up_to_its_first_batch(tmp_path: Path) -> None:
    told = Told()
    trainer = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    trainer.profiler = Preparing(trainer, told)
    trainer.validate(TinyModule(), TinyData(), verbose=False)
    assert told.phases[-2:] == ["first batch", "first batch done"]


def test_a_step_without_a_model_takes_the_batches_and_some_time() -> None:
    taken, log = [], logging.getLogger("lightning.pytorch")
    level = log.level

    class Batches:
        def __iter__(self) -> object:
            for number in range(4):
                taken.append(number)
                yield torch.zeros(2, 3)

        def __len__(self) -> int:
            return 4

    assert idle_step(torch.device("cpu"), Batches()) > 0
    assert taken == [0, 1, 2, 3]
    assert log.level == level
