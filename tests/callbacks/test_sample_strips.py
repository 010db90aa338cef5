"""Pictures drawn during real training."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import nn

from luve_lightning.callbacks import AtomicCheckpointIO, Checkpoints, SampleStrips
from luve_lightning.callbacks.sample_strips import _middle_frame
from luve_lightning.models.backbones import load_backbone
from luve_lightning.tasks import VLUerTask
from tests.helpers.upsampling import Shards, TinyPairs, tiny_task


@pytest.fixture(scope="module")
def pairs(tiny_backbone: Path) -> TinyPairs:
    return TinyPairs(tiny_backbone, clips=3)


def fit(task: VLUerTask, pairs: TinyPairs, *callbacks: L.Callback, steps: int = 4, **options: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_steps": steps,
        "val_check_interval": 1,
        "check_val_every_n_epoch": None,
        "limit_val_batches": len(pairs),
    }
    trainer = L.Trainer(callbacks=list(callbacks), **(settings | options))
    trainer.fit(task, Shards(pairs, [list(range(len(pairs)))]))
    return trainer


def drawn(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


@pytest.mark.slow
def test_fit_draws_when_a_multiple_has_passed(tiny_backbone: Path, pairs: TinyPairs, tmp_path: Path) -> None:
    fit(tiny_task(tiny_backbone), pairs, SampleStrips(tmp_path, every_n_steps=2, clips=2), num_sanity_val_steps=2)
    names = [f"clip-{clip}_x{scale}.png" for clip in (0, 1) for scale in ("1.5", "2")]
    assert drawn(tmp_path) == [f"step-{step:06d}/{name}" for step in (2, 4) for name in names]
    # Low resolution, bilinear, VLUer, original, each 48 pixels shown six times as large, with a detail below.
    with Image.open(tmp_path / "step-000002" / "clip-0_x2.png") as strip:
        assert strip.size == (4 * 288 + 3 * 4, 20 + 2 * 288 + 4)
        pixels = np.asarray(strip)
    original = pixels[20 : 20 + 288, 3 * 292 :]
    want = ((pairs.items[0]["video"][:, 2] + 1) * 127.5).round().permute(1, 2, 0).numpy()
    difference = np.abs(original[3::6, 3::6].astype(float) - want).max(axis=2)
    assert (difference == 0).mean() > 0.9  # all but the frame around the detail


@pytest.mark.slow
def test_a_multiple_between_two_validations_is_not_missed(
    tiny_backbone: Path, pairs: TinyPairs, tmp_path: Path
) -> None:
    strips = SampleStrips(tmp_path, every_n_steps=4, clips=1)
    fit(tiny_task(tiny_backbone), pairs, strips, steps=9, val_check_interval=3, limit_val_batches=1)
    assert drawn(tmp_path) == ["step-000006/clip-0_x1.5.png", "step-000009/clip-0_x1.5.png"]


class Killed(L.Callback):
    """Ends the run in the middle of the validation after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4])
def test_pictures_that_a_kill_prevented_are_drawn_on_resume(
    tiny_backbone: Path, pairs: TinyPairs, tmp_path: Path, step: int
) -> None:
    def start(*callbacks: L.Callback, ckpt_path: str | None = None) -> None:
        trainer = L.Trainer(
            default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, max_steps=4, val_check_interval=2, check_val_every_n_epoch=None,
            num_sanity_val_steps=0, plugins=AtomicCheckpointIO(),
            callbacks=[SampleStrips(tmp_path / "strips", 2, clips=2), Checkpoints(100), *callbacks],
        )  # fmt: skip
        shards = Shards(pairs, [list(range(len(pairs)))])
        trainer.fit(tiny_task(tiny_backbone), shards, ckpt_path=ckpt_path)

    with pytest.raises(InterruptedError):
        start(Killed(step))
    assert len(drawn(tmp_path / "strips")) == (step // 2 - 1) * 4 + 1
    start(ckpt_path="last")
    names = [f"clip-{clip}_x{scale}.png" for clip in (0, 1) for scale in ("1.5", "2")]
    assert drawn(tmp_path / "strips") == [f"step-{at:06d}/{name}" for at in (2, 4) for name in names]


@pytest.mark.slow
def test_drawing_leaves_training_as_it_was(tiny_backbone: Path, pairs: TinyPairs, tmp_path: Path) -> None:
    ends = []
    for callbacks in ([], [SampleStrips(tmp_path, every_n_steps=1, clips=1)]):
        L.seed_everything(3, verbose=False)
        task = tiny_task(tiny_backbone)
        fit(task, pairs, *callbacks, steps=3, limit_val_batches=2)
        numpy_state = np.random.get_state()[1]  # noqa: NPY002
        ends.append((task.net.state_dict(), torch.get_rng_state(), numpy_state, random.getstate()))
        assert task.net.training
    assert len(drawn(tmp_path)) == 3
    (plain, plain_torch, plain_numpy, plain_python), (weights, *generators) = ends
    assert all(torch.equal(weights[name], value) for name, value in plain.items())
    assert torch.equal(generators[0], plain_torch)
    assert np.array_equal(generators[1], plain_numpy)
    assert generators[2] == plain_python


@pytest.mark.slow
def test_test_always_draws_and_validate_does_not(tiny_backbone: Path, pairs: TinyPairs, tmp_path: Path) -> None:
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[SampleStrips(tmp_path, 1000, clips=1)]
    )
    data = Shards(pairs, [list(range(len(pairs)))], batch_size=3)
    trainer.validate(tiny_task(tiny_backbone), data, verbose=False)
    assert drawn(tmp_path) == []
    trainer.test(tiny_task(tiny_backbone), data, verbose=False)
    assert drawn(tmp_path) == ["test/clip-0_x1.5.png", "test/clip-0_x2.png"]


def test_a_diverged_model_is_drawn_black(tiny_backbone: Path, pairs: TinyPairs, tmp_path: Path) -> None:
    task = tiny_task(tiny_backbone)
    nn.init.constant_(task.net.decoder.conv_out.weight, float("nan"))
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[SampleStrips(tmp_path, 1, clips=1)]
    )
    trainer.test(task, Shards(pairs, [[0]]), verbose=False)
    with Image.open(tmp_path / "test" / "clip-0_x1.5.png") as strip:
        panel = np.asarray(strip)[20 : 20 + 288, 2 * 292 : 2 * 292 + 288]
    assert panel.max() == 0


def test_names_that_are_no_file_names(tiny_backbone: Path, pairs: TinyPairs, tmp_path: Path) -> None:
    item = pairs.items[0] | {"clip_id": "../a clip/é"}
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[SampleStrips(tmp_path, 1)]
    )
    trainer.test(tiny_task(tiny_backbone), Shards([item], [[0]]), verbose=False)  # type: ignore[arg-type]
    assert drawn(tmp_path) == ["test/.._a_clip___x1.5.png"]


@pytest.mark.slow
def test_wandb_gets_the_pictures_offline(tiny_backbone: Path, pairs: TinyPairs, tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="test")
    fit(tiny_task(tiny_backbone), pairs, SampleStrips(tmp_path / "strips", 2, clips=1), steps=2, logger=logger)
    logger.experiment.finish()
    pictures = list((tmp_path / "wandb").glob("offline-run-*/files/media/images/samples/*.png"))
    assert sorted(path.name.split("_")[0] for path in pictures) == ["x1.5", "x2"]


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_only_the_latents_up_to_the_middle_are_decoded(tiny_backbone: Path, frames: int) -> None:
    codec = load_backbone(tiny_backbone).latent_space()
    latents = torch.randn(1, 16, frames, 2, 2, generator=torch.Generator().manual_seed(0))
    whole = codec.decode(latents)
    middle = whole.shape[2] // 2
    torch.testing.assert_close(_middle_frame(codec, latents), whole[:, :, middle : middle + 1])


@pytest.mark.parametrize(("every", "clips"), [(0, 2), (-1, 2), (1, -1)])
def test_impossible_values_are_refused(tmp_path: Path, every: int, clips: int) -> None:
    with pytest.raises(ValueError, match=r"(every_n_steps: expected at least 1|clips: expected at least 0), got"):
        SampleStrips(tmp_path, every, clips)
