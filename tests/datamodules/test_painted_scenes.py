"""Painted scenes: what a view shows is what its labels say."""

from __future__ import annotations

import numpy as np
import torch

from luve_lightning.data.mini_world.paint import paint_scene
from luve_lightning.data.mini_world.stage import draw_stage
from luve_lightning.datamodules.painted_scenes import PaintedViews, spoil
from luve_lightning.models.recogniser import TAUGHT


def test_a_view_follows_from_its_number_alone() -> None:
    views = PaintedViews(5, 3, 2, spoilt=True)
    first, again = views[1], PaintedViews(5, 2, 2, spoilt=True)[1]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["clips"].shape == (2, 9, 192, 192, 3)
    assert first["patches"].shape == (2, 4, 3, 64, 64)


def test_spoiling_says_what_it_did() -> None:
    frames = paint_scene(next(draw_stage("combinations", 7, "test", 1, 9, 96, 8)))
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
