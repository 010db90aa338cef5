"""Scenes of the mini world, painted as they are used, for training the network that recognises what they show.

They have seeds of their own, so no clip of a rendered world is among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from luve_lightning.data.mini_world.paint import apply_grade, paint_scene
from luve_lightning.data.mini_world.scene import STAGE, Grade, photograph_named
from luve_lightning.data.mini_world.stage import MOTIONS, SPRITES, StagedScene, draw_stage
from luve_lightning.functional.takes import blurred, flickering, frozen_from, levels, noisy, shrunken, shuffled
from luve_lightning.machine import cores
from luve_lightning.models.recogniser import FRAMES, LEFT_OUT, SIDE, TAUGHT

_PAINTED = 2 * FRAMES - 1  # of a whole clip; a view has every one of a half, or every second
_PATCH, _PATCHES = 64, 4  # side, and number of a view


def recoloured(frames: Tensor, degrees: float) -> Tensor:
    """uint8 frames T x H x W x 3 with another hue."""
    count, height, width, _ = frames.shape
    picture = frames.permute(3, 0, 1, 2).reshape(3, count * height, width) / 255
    return levels(apply_grade(picture, Grade(hue=degrees)) * 255).view(3, count, height, width).permute(1, 2, 3, 0)


_SPOILT: dict[str, Callable[[Tensor, float, Generator], Tensor]] = {
    "blur": lambda frames, sigma, _: blurred(frames, sigma),
    "noise": noisy,
    "shrink": lambda frames, amount, _: shrunken(frames, 1 + amount),
    "colours": lambda frames, degrees, _: recoloured(frames, degrees),
    "flicker": flickering,
    "frozen": lambda frames, share, _: frozen_from(frames, share),
    "shuffled": lambda frames, group, rng: shuffled(frames, max(2, round(group)), rng),
}


def spoil(clip: Tensor, rng: Generator) -> tuple[Tensor, dict[str, float]]:
    """A clip with random faults of those that are taught, in a third of the cases none.

    Args:
        clip: uint8 T x H x W x 3.
        rng: the randomness.

    Returns:
        The clip, and how much a person sees of each fault, 0 to 1.
    """
    seen = dict.fromkeys(TAUGHT, 0.0)
    if rng.random() < 1 / 3:
        return clip, seen
    for fault, (begin, strongest) in TAUGHT.items():
        degree, sign = float(rng.uniform(0.15, 1.0)), float(rng.choice([-1, 1]))
        if rng.random() > 0.25:
            continue
        seen[fault] = degree
        # Logarithmic from where it begins to be seen, unless that is at once.
        amount = begin * math.expm1(degree * math.log1p(strongest / begin)) if begin else degree * strongest
        clip = _SPOILT[fault](clip, amount * sign if fault == "colours" else amount, rng)
    return clip, seen


class PaintedViews(Dataset[dict[str, Tensor]]):
    """Several views of each scene: a window in time, perhaps spoilt.

    Each follows from the seed and its number alone. One in nine has no sprite, one in nine another photograph.

    Args:
        seed: seed of the first scene.
        scenes: number of scenes.
        views: views of each.
        spoilt: whether views are spoilt; without it, all show combinations that training holds out.
    """

    def __init__(self, seed: int, scenes: int, views: int, spoilt: bool) -> None:
        self.seed, self.scenes, self.views, self.spoilt = seed, scenes, views, spoilt

    def __len__(self) -> int:
        return self.scenes

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """`clips` V x T x H x W x 3 and `patches` V x P x 3 x S x S, uint8, and V labels of each kind."""
        rng = np.random.default_rng([self.seed, number])
        kind, split = "combinations", str(rng.choice(["val", "test"]))
        if self.spoilt:
            split = str(rng.choice(["train", "val", "test"], p=(0.8, 0.1, 0.1)))
            if rng.random() < 1 / 9:
                kind, split = "photographs", str(rng.choice(["val", "test"]))
        scene = next(draw_stage(kind, self.seed + number, split, 1, _PAINTED, SIDE, 8))  # type: ignore[arg-type]
        assert isinstance(scene, StagedScene)
        if self.spoilt and rng.random() < 1 / 9:
            scene = replace(scene, sprites=(), sprite="")
        frames = paint_scene(scene)
        views = [self._view(scene, frames, rng) for _ in range(self.views)]
        return {name: torch.stack([view[name] for view in views]) for name in views[0]}

    def _view(self, scene: StagedScene, frames: Tensor, rng: Generator) -> dict[str, Tensor]:
        start = int(rng.integers(FRAMES))
        clip = frames[::2] if rng.random() < 0.25 else frames[start : start + FRAMES]
        seen = dict.fromkeys(TAUGHT, 0.0)
        if self.spoilt:
            clip, seen = spoil(clip, rng)
        shown = photograph_named(scene.url)
        still = max(seen["frozen"], min(seen["shuffled"], 0.8))
        motion = 0 if still > 0.8 else LEFT_OUT if still > 0.4 else 1 + list(MOTIONS).index(scene.motion)
        top, left = rng.integers(SIDE - _PATCH + 1, size=(2, _PATCHES))
        chosen = rng.integers(len(clip), size=_PATCHES)
        patches = [clip[t, y : y + _PATCH, x : x + _PATCH] for t, y, x in zip(chosen, top, left, strict=True)]
        known = [photograph.url for photograph in STAGE if photograph.split == "train"]
        return {
            "clips": clip.contiguous(),
            "patches": torch.stack(patches).permute(0, 3, 1, 2),
            "photographs": torch.tensor(1 + known.index(scene.url) if scene.url in known else 0),
            "motions": torch.tensor(motion),
            "sprites": torch.tensor(1 + list(SPRITES).index(scene.sprite) if scene.sprite else 0),
            "faults": torch.tensor(list(seen.values())),
            "coloured": torch.tensor(float(shown.color)),
        }


class PaintedScenes(L.LightningDataModule):
    """Painted scenes for `RecogniserTask`, in the order of their numbers.

    Args:
        seed: seed of the first scene; those after it have the next ones. Rendered worlds have others.
        scenes: scenes of an epoch.
        views: views of each scene.
        batch_size: scenes a step.
        val_scenes: scenes of validation, unspoilt.
        num_workers: processes that paint; None for one a core.
    """

    def __init__(
        self,
        seed: int = 1_000_000,
        scenes: int = 4000,
        views: int = 4,
        batch_size: int = 8,
        val_scenes: int = 200,
        num_workers: int | None = None,
    ) -> None:
        super().__init__()
        if seed < 0 or min(scenes, views, batch_size, val_scenes) < 1:
            raise ValueError("expected seed >= 0 and scenes, views, batch_size and val_scenes >= 1")
        self.seed, self.scenes, self.views, self.batch_size = seed, scenes, views, batch_size
        self.val_scenes, self.num_workers = val_scenes, cores() if num_workers is None else num_workers
        self._start = 0

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Views of all scenes, from where a resumed run stopped."""
        views = PaintedViews(self.seed, self.scenes, self.views, spoilt=True)
        start, self._start = self._start, 0
        return self._loader(Subset(views, range(start * self.batch_size, self.scenes)))

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """One unspoilt view of each scene of validation."""
        return self._loader(PaintedViews(self.seed + self.scenes, self.val_scenes, 1, spoilt=False))

    def _loader(self, views: Dataset[dict[str, Tensor]]) -> DataLoader[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(views, self.batch_size, num_workers=self.num_workers, generator=generator)

    def state_dict(self) -> dict[str, Any]:
        """The batches of this epoch that were used."""
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        return {"batches": progress.current.processed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batches that were used."""
        self._start = int(state["batches"])
