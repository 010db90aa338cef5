"""Spectra recorded in real training."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from luve_lightning.callbacks import EMA, DenoisingSpectra
from luve_lightning.tasks import BackboneTask
from tests.helpers.tiny_flow import World, make_trainer

NET = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 1, "freq_dim": 16}
TEXT = {"d_model": 16, "num_heads": 2, "d_kv": 8, "d_ff": 16, "num_layers": 1, "dropout_rate": 0.1}


def task(world: World) -> BackboneTask:
    torch.manual_seed(0)
    return BackboneTask(world.backbone, world.clips / "clips.csv", dict(NET), dict(TEXT), length=9, shift=3.0, lr=1e-2)


def spectra(folder: Path, **changes: Any) -> DenoisingSpectra:
    options: dict[str, Any] = {
        "prompts": ["squares drift", "left"], "height": 32, "width": 32, "frames": 5, "every_n_steps": 2,
        "steps": 3, "guidance": 2.0, "edges": [0, 0.5, 1],
    }  # fmt: skip
    return DenoisingSpectra(folder, **(options | changes))


def fit(world: World, folder: Path, *callbacks: Any, **options: Any) -> BackboneTask:
    model = task(world)
    settings = {"max_steps": 3, "limit_val_batches": 1, "val_check_interval": 1, "num_sanity_val_steps": 1}
    trainer = make_trainer(folder, callbacks=[EMA(0.5), *callbacks], **(settings | options))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002 - what training could draw from
    trainer.fit(model, world.data(texts=None, passes=3, batch_size=2))
    return model


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_training_is_as_without_it(world: World, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "logs", name="", version="")
    with_it = fit(world, tmp_path, spectra(tmp_path / "spectra"), logger=logger)
    drawn = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    without = fit(world, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(with_it.parameters(), without.parameters(), strict=True))
    assert torch.equal(drawn[0], torch.rand(3))
    assert drawn[1:] == (random.random(), np.random.rand())  # noqa: NPY002
    # Steps 1 to 3 were validated; only 2 is a multiple, and the sanity check is none.
    assert files(tmp_path / "spectra") == ["step-000002.csv", "step-000002.png"]
    with (tmp_path / "spectra" / "step-000002.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "0", "1", "1", "2", "2"]
    assert [float(row["resolved"]) for row in rows[-2:]] == [1, 1]
    assert [float(row["sigma"]) for row in rows[::2]] == sorted(
        (float(row["sigma"]) for row in rows[::2]), reverse=True
    )
    with (tmp_path / "logs" / "metrics.csv").open(newline="") as file:
        logged = [row["spectra/sigma_switch"] for row in csv.DictReader(file)]
    (switch,) = [value for value in logged if value]
    assert 0 < float(switch) <= 1


@pytest.mark.slow
def test_the_average_is_what_generates(world: World, tmp_path: Path) -> None:
    tables = {}
    for name, decay in (("kept", 0.0), ("average", 0.999)):
        model, output = task(world), tmp_path / name
        callbacks = [EMA(decay), spectra(output, every_n_steps=1)]
        trainer = make_trainer(tmp_path, callbacks=callbacks, max_steps=2, limit_val_batches=1, val_check_interval=2)
        trainer.fit(model, world.data(texts=None, passes=3, batch_size=2))
        tables[name] = (output / "step-000002.csv").read_text()
        trainer.test(model, world.data(texts=None), verbose=False)
        assert (output / "test.csv").read_text() == tables[name], "the test's weights are the last validation's"
    assert tables["kept"] != tables["average"]


def test_wandb_gets_the_plot_offline(world: World, tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="test")
    trainer = make_trainer(tmp_path, callbacks=[spectra(tmp_path / "spectra", steps=2)], logger=logger)
    trainer.test(task(world), world.data(texts=None), verbose=False)
    logger.experiment.finish()
    pictures = list((tmp_path / "wandb").glob("offline-run-*/files/media/images/spectra/*.png"))
    assert [path.name.split("_")[0] for path in pictures] == ["resolved"]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_diverged_model_does_not_end_the_run(world: World, tmp_path: Path) -> None:
    model = task(world)
    with torch.no_grad():
        model.transformer.proj_out.weight.fill_(torch.nan)
    trainer = make_trainer(tmp_path, callbacks=[spectra(tmp_path / "spectra")], max_steps=1)
    with pytest.warns(UserWarning, match="no spectra at step 0: the generated latents are not finite"):
        trainer.test(model, world.data(texts=None), verbose=False)
    assert not (tmp_path / "spectra").exists()


def test_bad_configurations_are_one_line(world: World, tmp_path: Path) -> None:
    for changes, message in (
        ({"prompts": []}, "prompts: expected at least one"),
        ({"every_n_steps": 0}, "every_n_steps: expected at least 1, got 0"),
        ({"edges": [0, 1]}, "edges: expected at least two bands"),
    ):
        with pytest.raises(ValueError, match=message):
            spectra(tmp_path, **changes)
    trainer = make_trainer(tmp_path, callbacks=[spectra(tmp_path)], max_steps=1)
    with pytest.raises(ValueError, match=r"ExpertTask cannot generate from a text") as caught:
        trainer.fit(world.expert(), world.data())
    assert "\n" not in str(caught.value)
