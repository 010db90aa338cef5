"""Training the recogniser: what a view shows is what its labels say, and faults are what they are called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from luve_lightning.data.mini_world.paint import paint_scene
from luve_lightning.data.mini_world.scene import Scene
from luve_lightning.data.mini_world.stage import draw_stage
from luve_lightning.models.recogniser import RecognisedLabels, Recogniser
from luve_lightning.tasks.recogniser import FAULTS, TAUGHT, PaintedViews, RecogniserTask, faulty, spoil, world_labels


@pytest.fixture(scope="module")
def scene() -> Scene:
    return next(draw_stage("combinations", 7, "test", 1, 9, 96, 8))


@pytest.fixture(scope="module")
def frames(scene: Scene) -> Tensor:
    return paint_scene(scene)


def test_every_part_of_a_combination_has_its_sentence() -> None:
    labels = world_labels()
    assert labels.sizes() == {"photographs": 17, "motions": 9, "sprites": 9, "faults": 7}
    assert all(len(set(kind)) == len(kind) for kind in (labels.photographs, labels.motions, labels.sprites))
    assert "the camera turns clockwise" in labels.motions
    assert "a red heart is in front" in labels.sprites


def test_a_view_follows_from_its_number_alone() -> None:
    views = PaintedViews(5, 3, 2, spoilt=True)
    first, again = views[1], PaintedViews(5, 2, 2, spoilt=True)[1]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["clips"].shape == (2, 9, 192, 192, 3)
    assert first["patches"].shape == (2, 4, 3, 64, 64)


def test_training_goes_on_from_a_saved_network(tmp_path: Path) -> None:
    first = RecogniserTask(spotted=8)
    first.export(tmp_path, None)
    again = RecogniserTask(init_from=tmp_path / "recogniser.safetensors")
    assert all(p.requires_grad for p in again.parameters())
    for name, weight in again.net.state_dict().items():
        torch.testing.assert_close(weight, first.net.state_dict()[name], rtol=1e-3, atol=1e-4)
    other = Recogniser(RecognisedLabels(("a",), ("b",), ("c",), ("d",)))
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="another world's labels"):
        RecogniserTask(init_from=tmp_path / "other.safetensors")


@pytest.mark.slow
def test_the_losses_fall_on_one_batch() -> None:
    torch.manual_seed(0)
    task = RecogniserTask()
    views = PaintedViews(11, 4, 1, spoilt=True)
    batch = {name: torch.stack([views[i][name] for i in range(4)]) for name in views[0]}
    optimizer = torch.optim.AdamW(task.parameters(), 3e-3)
    totals = []
    for _ in range(8):
        losses = task.losses(batch)
        totals.append(torch.stack(list(losses.values())).sum())
        optimizer.zero_grad()
        totals[-1].backward()
        optimizer.step()
    assert totals[-1] < 0.7 * totals[0]


@pytest.mark.parametrize("fault", FAULTS)
def test_more_of_a_fault_changes_more(scene: Scene, frames: Tensor, fault: str) -> None:
    changed = [(faulty(scene, frames, fault, amount).float() - frames).abs().mean() for amount in FAULTS[fault]]
    if fault in ("photograph", "sprite", "motion"):  # shares of clips; this one is the first of three
        assert changed[0] == changed[1] == 0 < changed[2]
    else:
        assert 0 < changed[0] < changed[2]


def test_a_share_of_clips_is_that_of_the_first_ones(frames: Tensor) -> None:
    scenes = list(draw_stage("combinations", 7, "test", 6, 9, 96, 8))
    hit = [not torch.equal(faulty(one, frames, "motion", 1 / 3), frames) for one in scenes]
    assert hit == [False, False, True, False, False, True]


def test_a_frozen_clip_stands_still(scene: Scene, frames: Tensor) -> None:
    half = faulty(scene, frames, "frozen", 0.5)
    assert torch.equal(half[:5], frames[:5])
    assert torch.equal(half[5:], frames[4:5].expand(4, -1, -1, -1))


def test_tiles_repeat_the_first_part(scene: Scene, frames: Tensor) -> None:
    tiled = faulty(scene, frames, "tiles", 4)
    assert torch.equal(tiled[:, 24:48, 72:96], frames[:, :24, :24])


def test_spoiling_says_what_it_did(frames: Tensor) -> None:
    rng = np.random.default_rng(0)
    found = [spoil(frames, rng) for _ in range(40)]
    untouched = [torch.equal(clip, frames) for clip, seen in found if not any(seen.values())]
    assert len(untouched) > 8
    assert all(untouched)
    for fault in TAUGHT:
        degrees = [seen[fault] for _, seen in found if seen[fault]]
        assert degrees
        assert min(degrees) >= 0.15
        assert max(degrees) <= 1
