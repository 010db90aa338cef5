"""Metrics and videos of what real training runs make on the way."""

from __future__ import annotations

import csv
import os
import random
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from PIL import Image

from luve_lightning.callbacks import EMA, AtomicCheckpointIO, SampleMetrics, StopRequested
from luve_lightning.callbacks.repeatable import undisturbed
from luve_lightning.data.video_files import read_video
from luve_lightning.evaluation.pictures import contact_sheet, side_by_side
from luve_lightning.evaluation.sample_sources import GeneratedVideos, Samples, SampleVideo, UpsampledVideos
from luve_lightning.functional.patches import frechet_distance
from tests.helpers.processes import run_processes
from tests.helpers.resumable import Run, difference, load_final, train
from tests.helpers.sampling import (
    Brightness,
    Error,
    FailingOnOne,
    Meddler,
    Meddling,
    Missing,
    SlowOnOne,
    adapt_sharded,
    colour_distance,
    pairs,
    sampler,
    train_vluer,
    vluer_task,
)
from tests.helpers.tiny_flow import World, make_trainer
from tests.helpers.tiny_wan import load_transformer


@pytest.fixture
def world(held_out_world: World) -> World:
    return held_out_world


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "samples" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def train_in_processes(run: Run) -> None:
    if run.processes == 1:
        train_vluer(run)
    else:
        status = run_processes(run, train_vluer)
        assert status == [0] * run.processes, (run.folder / "output-0.txt").read_text()


def fit(run: Run, world: World, **changes: Any) -> tuple[Any, SampleMetrics]:
    callback = sampler(run.folder, **changes)
    trainer = train(run.with_(callbacks=(callback, *run.callbacks)), vluer_task(world), pairs(world))
    return trainer, callback


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_training_does_not_notice(world: World, tmp_path: Path, processes: int) -> None:
    """Whatever the source and the metrics do to generators, modes, flags and settings."""
    meddling = {"source": Meddling(2.0, clips=3), "metrics": {"meddler": Meddler()}, "videos": 2}
    runs = [
        Run(tmp_path / name, steps=5, processes=processes, task={"world": world} | more)
        for name, more in (("without", {}), ("with", {"samples": meddling}))
    ]
    for run in runs:
        train_in_processes(run)
    assert [(row["step"], row["n"]) for row in read(runs[1].folder)] == [("2", "3"), ("4", "3"), ("5", "3")]
    assert difference(load_final(runs[0]), load_final(runs[1])) is None
    assert runs[0].journal() == runs[1].journal() != []


@pytest.mark.slow
def test_two_processes_measure_what_one_does(world: World, tmp_path: Path) -> None:
    """Three videos: the second round of two processes is filled up."""
    still = {"lr": 1e-30, "min_lr": 0.0}  # steps that change no weight, so that both runs measure the same model
    tables = []
    for processes in (1, 2):
        run = Run(tmp_path / f"{processes}", steps=2, processes=processes,
                  task={"world": world, "task": still, "samples": {"videos": 3}})  # fmt: skip
        train_in_processes(run)
        tables.append([{k: v for k, v in row.items() if k != "seconds"} for row in read(run.folder)])
        assert len(list((run.folder / "samples" / "step-000002").glob("*.mp4"))) == 3
    assert tables[0] == tables[1]
    assert list(tables[0][0]) == ["step", "n", "fd_patch_colours", "brightness", "error"]
    assert tables[0][0]["n"] == "3"
    assert float(tables[0][0]["fd_patch_colours"]) > 0


def test_the_numbers_are_those_of_the_averaged_weights(world: World, tmp_path: Path) -> None:
    trainer, _ = fit(Run(tmp_path, steps=2), world)
    [row] = read(tmp_path)
    task, data = trainer.lightning_module, trainer.datamodule
    ema = next(c for c in trainer.callbacks if isinstance(c, EMA))
    frames = []
    with torch.no_grad(), ema.averaged(task), UpsampledVideos(2.0, 3).open(
        task.eval(), data, trainer.precision_plugin.forward_context
    ) as samples:  # fmt: skip
        frames = [(samples.make(i), samples.names[i]) for i in range(3)]
    brightness = np.mean([made.frames.double().mean() / 255 for made, _ in frames])
    error = np.mean([(made.frames.double() - made.reference.double()).abs().mean() for made, _ in frames])  # type: ignore[union-attr]
    assert float(row["brightness"]) == pytest.approx(brightness, rel=1e-5)
    assert float(row["error"]) == pytest.approx(error, rel=1e-5)
    metric = colour_distance()
    metric.prepare("cpu")
    made, real = (
        torch.cat([metric.features(frames, name) for frames, name in videos]).double()
        for videos in ([(one.frames, name) for one, name in frames], [(one.reference, name) for one, name in frames])
    )
    expected = frechet_distance(made.mean(0), made.T.cov(), real.mean(0), real.T.cov())
    assert float(row["fd_patch_colours"]) == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        plain = task.net(torch.ones(1, 16, 3, 3, 3), (3, 6, 6))
        with ema.averaged(task):
            assert not torch.equal(task.net(torch.ones(1, 16, 3, 3, 3), (3, 6, 6)), plain)


@pytest.mark.slow
def test_a_resumed_run_goes_on_and_a_new_one_starts_anew(world: World, tmp_path: Path) -> None:
    run = Run(tmp_path, steps=3)
    fit(run, world)
    first = read(tmp_path)
    assert [row["step"] for row in first] == ["2", "3"]
    fit(run.with_(steps=6, resume="last"), world)
    rows = read(tmp_path)
    assert [row["step"] for row in rows] == ["2", "3", "4", "6"]
    assert rows[:2] == first, "measured once"
    fit(run.with_(steps=4), world)
    assert [row["step"] for row in read(tmp_path)] == ["2", "4"]


@pytest.mark.slow
def test_a_missing_network_is_told_once_and_left_out(world: World, tmp_path: Path) -> None:
    metrics = {"missing": Missing(), "brightness": Brightness(), "off": None}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Run(tmp_path, steps=5), world, metrics=metrics)
    told = [str(w.message) for w in caught if "left out" in str(w.message)]
    assert told == ["samples: missing is left out: network.pt (1 MB) is not in ~/.cache"]
    assert list(read(tmp_path)[0]) == ["step", "n", "seconds", "brightness"]


def test_with_nothing_left_to_measure_no_sample_is_made(world: World, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="missing is left out"):
        fit(Run(tmp_path, steps=2), world, metrics={"missing": Missing()})
    assert not (tmp_path / "samples").exists()


def test_the_budget_ends_an_evaluation(world: World, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Run(tmp_path, steps=4), world, budget_seconds=0.0)
    assert [row["n"] for row in read(tmp_path)] == ["1", "1"]
    told = [str(w.message) for w in caught if "left out" in str(w.message)]
    assert len(told) == 2, "at each evaluation"
    for step, text in zip((2, 4), told, strict=True):
        expected = f"samples, step {step}: budget_seconds = 0 left out 2 of 3 videos, first "
        assert text.startswith(expected), text
        # By the name that its file would have: the second video's.
        assert text.removeprefix(expected).startswith("001-"), text
        assert text.endswith("the metrics are of n = 1")


@pytest.mark.slow
def test_the_budget_of_one_rank_ends_it_on_all(world: World, tmp_path: Path) -> None:
    slow = {"source": SlowOnOne(2.0, clips=4), "budget_seconds": 1.5}
    run = Run(tmp_path, steps=2, processes=2, task={"world": world, "samples": slow})
    train_in_processes(run)
    assert [row["n"] for row in read(tmp_path)] == ["2"]


@pytest.mark.slow
def test_an_error_on_one_rank_ends_the_run_on_all(world: World, tmp_path: Path) -> None:
    failing = {"source": FailingOnOne(2.0, clips=2)}
    run = Run(tmp_path, steps=4, processes=2, task={"world": world, "samples": failing})
    status = run_processes(run, train_vluer)
    assert status[0] not in (0, None)
    assert status[1] == 0, "it did not hang"
    text = (tmp_path / "output-0.txt").read_text()
    assert "rank 1 failed" in text
    assert "OSError: disk on fire" in text
    with pytest.raises(OSError, match="disk on fire"):
        fit(Run(tmp_path / "alone", steps=4), world, source=FailingOnOne(2.0, clips=2))


def test_a_metric_that_cannot_measure_such_videos_is_found_out_at_once(world: World, tmp_path: Path) -> None:
    large = colour_distance()
    large.patches = type(large.patches)(size=256)
    with pytest.raises(ValueError, match="256"):
        fit(Run(tmp_path, steps=4), world, metrics={"fd_patch_colours": large})
    assert not (tmp_path / "journal-0.jsonl").exists(), "before the first step"


@pytest.mark.slow
def test_nothing_of_it_is_in_the_module_or_its_checkpoint(world: World, tmp_path: Path) -> None:
    trainer, callback = fit(Run(tmp_path, steps=4, every_n_steps=4), world)
    plain = vluer_task(world)
    assert set(trainer.lightning_module.state_dict()) == set(plain.state_dict())
    trained = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert len(trained) == sum(p.requires_grad for p in plain.parameters())
    checkpoint = AtomicCheckpointIO().load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert not [key for key in checkpoint["callbacks"] if "SampleMetrics" in key]
    assert callback.state_dict() == {}


class Signals(UpsampledVideos):
    """The process is told to stop while it makes a video."""

    @contextmanager
    def open(self, task: Any, datamodule: Any, precision: Any) -> Iterator[Samples]:
        with super().open(task, datamodule, precision) as samples:
            if task.global_step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield samples


def test_a_run_that_is_told_to_stop_does_not_finish_its_samples(world: World, tmp_path: Path) -> None:
    with pytest.raises(StopRequested):
        fit(Run(tmp_path, steps=9), world, source=Signals(2.0, clips=3), videos=3)
    assert len(list((tmp_path / "samples").rglob("*.mp4"))) == 1
    assert not (tmp_path / "samples" / "metrics.csv").exists()


class Originals(UpsampledVideos):
    """As if the model were perfect: what a random VAE decodes is noise, which no encoder keeps."""

    @contextmanager
    def open(self, task: Any, datamodule: Any, precision: Any) -> Iterator[Samples]:
        with super().open(task, datamodule, precision) as samples:
            yield replace(samples, make=lambda index: SampleVideo(samples.real(index), samples.real(index)))


@pytest.mark.slow
def test_videos_and_values_reach_disk_and_loggers(world: World, tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="test")
    loggers = [CSVLogger(tmp_path, name="log", version=0), logger]
    run = Run(tmp_path, steps=2, trainer={"logger": loggers})
    trainer, _ = fit(run, world, videos=2, source=Originals(2.0, clips=3))
    logger.experiment.finish()
    files = sorted((tmp_path / "samples" / "step-000002").iterdir())
    assert [file.name[:4] for file in files] == ["000-", "001-"]
    frames, fps = read_video(files[0])
    assert (frames.shape, fps) == ((9, 48, 48, 3), 16.0)
    data = trainer.datamodule  # type: ignore[attr-defined]
    source, context = UpsampledVideos(2.0, 3), trainer.precision_plugin.forward_context
    with source.open(trainer.lightning_module, data, context) as samples:
        errors = [np.abs(frames.astype(float) - samples.real(i).numpy()).mean() for i in range(3)]
    assert 5 * errors[0] < min(errors[1:]), "the first video, but for its compression"
    media = list((tmp_path / "wandb").glob("offline-run-*/files/media/videos/samples/*.mp4"))
    assert len(media) == 2
    with (tmp_path / "log" / "version_0" / "metrics.csv").open() as file:
        [logged] = [row for row in csv.DictReader(file) if row["samples/n"]]
    [row] = read(tmp_path)
    assert float(logged["samples/brightness"]) == pytest.approx(float(row["brightness"]), rel=1e-4)
    assert (logged["step"], float(logged["samples/n"])) == ("2", 3)


def test_videos_alone(world: World, tmp_path: Path) -> None:
    """In the run's folder, when no other is given; and a sheet of them over the clips that they resemble."""
    trainer, _ = fit(Run(tmp_path, steps=1), world, metrics=None, videos=2, output=None, sheet=True)
    [one, two] = sorted((tmp_path / "samples" / "step-000001").iterdir())
    with Image.open(tmp_path / "samples" / "step-000001.jpg") as file:
        drawn = np.asarray(file.convert("RGB")).astype(float)
    context = trainer.precision_plugin.forward_context
    with UpsampledVideos(2.0, 2).open(trainer.lightning_module, trainer.datamodule, context) as samples:
        rows = [{"sample": read_video(p)[0], "clip": samples.real(i).numpy()} for i, p in enumerate((one, two))]
        pictures = [contact_sheet(row, caption) for row, caption in zip(rows, samples.captions, strict=True)]
    expected = np.asarray(side_by_side(pictures)).astype(float)
    assert drawn.shape == expected.shape
    assert np.abs(drawn - expected).mean() < 4, "but for the compression"
    assert [row["step"] for row in read(tmp_path)] == ["1"]


def test_accumulated_batches_are_one_step(world: World, tmp_path: Path) -> None:
    fit(Run(tmp_path, steps=3, accumulate=3), world, metrics={"brightness": Brightness()})
    assert [row["step"] for row in read(tmp_path)] == ["2", "3"]


@pytest.mark.slow
def test_a_fast_dev_run_leaves_no_files(world: World, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fast_dev_run=2, limit_val_batches=None, callbacks=[sampler(tmp_path, videos=1)])
    trainer.fit(vluer_task(world), pairs(world))
    assert trainer.global_step == 2
    assert not (tmp_path / "samples").exists()


@pytest.mark.slow
def test_sharded_weights_make_samples_together(world: World, tmp_path: Path) -> None:
    runs = [
        Run(tmp_path / f"{samples}", steps=3, processes=2, task={"world": world, "samples": samples})
        for samples in (False, True)
    ]
    for run in runs:
        assert run_processes(run, adapt_sharded) == [0, 0], (run.folder / "output-0.txt").read_text()[-3000:]
    assert [(row["step"], row["n"]) for row in read(runs[1].folder)] == [("2", "3"), ("3", "3")]
    states = [load_transformer(run.folder / "transformer").state_dict() for run in runs]
    assert difference(*map(dict, states)) is None
    assert difference(dict(load_transformer(world.backbone).state_dict()), dict(states[0])) is not None


def _meddle(trainer: Any, task: Any) -> None:
    with undisturbed(trainer, task):
        assert not task.net.training
        assert not torch.is_grad_enabled()
        Meddler().score(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
        task.requires_grad_(False)
        raise ArithmeticError


def test_undisturbed_also_when_it_fails(world: World, tmp_path: Path) -> None:
    trainer, _ = fit(Run(tmp_path, steps=1), world)
    task = trainer.lightning_module.train()
    before = [
        torch.get_rng_state(), random.getstate(), [m.training for m in task.modules()],
        [p.requires_grad for p in task.parameters()], torch.backends.cudnn.benchmark,
        {k: v.clone() for k, v in task.state_dict().items()},
    ]  # fmt: skip
    with pytest.raises(ArithmeticError):
        _meddle(trainer, task)
    after = [
        torch.get_rng_state(), random.getstate(), [m.training for m in task.modules()],
        [p.requires_grad for p in task.parameters()], torch.backends.cudnn.benchmark, task.state_dict(),
    ]  # fmt: skip
    assert difference(before, after) is None
    assert torch.is_grad_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every_n_steps": 0}, "expected every_n_steps >= 1"),
        ({"videos": -1}, "videos >= 0"),
        ({"sheet": True}, "sheet: shows the videos that are kept"),
        ({"budget_seconds": -1.0}, "budget_seconds: expected at least 0"),
        ({"metrics": {}}, "there is nothing to make samples for"),
        ({"metrics": {"x": torch.nn.Identity()}}, "x: expected a VideoMetric or FrechetPatchDistance, got Identity"),
        ({"source": GeneratedVideos(16, 16, 5), "metrics": {"error": Error()}}, "error compares with an original"),
    ],
)
def test_impossible_values_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(tmp_path, **changes)


def test_another_table_is_not_overwritten(world: World, tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is not a table of this callback"):
        fit(Run(tmp_path, steps=2), world)
