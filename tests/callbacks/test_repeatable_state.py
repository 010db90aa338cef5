"""The generators' states come back."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from luve_lightning.callbacks import AtomicCheckpointIO
from luve_lightning.callbacks.repeatable import random_state, set_random_state
from tests.helpers.processes import run_processes
from tests.helpers.resumable import Run, train

CPU = torch.device("cpu")


def draw() -> list[float]:
    return [
        float(torch.randn(())),
        float(np.random.standard_normal()),  # noqa: NPY002
        float(np.random.random()),  # noqa: NPY002
        random.gauss(0, 1),
        random.random(),
    ]


def test_every_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    draw()  # numpy and Python keep the second number of a Gaussian pair
    torch.save(random_state(CPU), tmp_path / "a.pt")
    expected = [draw(), draw()]
    set_random_state(torch.load(tmp_path / "a.pt", weights_only=True), CPU)
    assert [draw(), draw()] == expected


class DrawOnRankOne(L.Callback):
    """Ranks start from one seed; this sets them apart."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_rank == 1:
            draw()


@pytest.mark.slow
def test_each_rank_gets_its_own_and_another_number_of_processes_is_told(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=3, processes=2, every_n_steps=3, callbacks=(DrawOnRankOne(),))
    assert run_processes(run) == [0, 0]
    first, second = AtomicCheckpointIO().load_checkpoint(run.last)["random_state"]
    assert first["python"][0] == second["python"][0]
    assert not torch.equal(first["torch"], second["torch"])
    with pytest.warns(UserWarning, match=r"2 process\(es\), this run has 1: random numbers start afresh"):
        train(run.with_(steps=4, processes=1, callbacks=(), resume=str(run.last)))
