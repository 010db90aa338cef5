"""Known faults are what they are called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from luve_lightning.analysis.benchmarks.evaluate import FAULTS, faulty
from luve_lightning.data.mini_world.paint import paint_scene
from luve_lightning.data.mini_world.scene import Scene
from luve_lightning.data.mini_world.stage import draw_stage


@pytest.fixture(scope="module")
def scene() -> Scene:
    return next(draw_stage("combinations", 7, "test", 1, 9, 96, 8))


@pytest.fixture(scope="module")
def frames(scene: Scene) -> Tensor:
    return paint_scene(scene)


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
