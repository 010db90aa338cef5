"""Training of the network that recognises what the mini world's clips show, on clips that are painted as they are used.

Its scenes have seeds of their own, so no clip of a rendered world is among them. Known faults, on which measures are
tried, are here too: the network is taught some of them, and the measures must see all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from luve_lightning.data.mini_world import captions
from luve_lightning.data.mini_world.paint import apply_grade, paint_scene
from luve_lightning.data.mini_world.scene import STAGE, Grade, Scene, photograph_named
from luve_lightning.data.mini_world.stage import MOTIONS, SPRITES, StagedScene, draw_stage
from luve_lightning.functional.pixels import frames_to_video, resize_video, video_to_frames
from luve_lightning.functional.unsharp import unsharp_mask
from luve_lightning.machine import cores
from luve_lightning.models.recogniser import FRAMES, SIDE, RecognisedLabels, Recogniser, load_recogniser
from luve_lightning.tasks.base import TrainingTask

_PAINTED = 2 * FRAMES - 1  # of a whole clip; a view has every one of a half, or every second
_PATCH, _PATCHES = 64, 4  # side, and number of a view
_LEFT_OUT = -100  # a label that the loss ignores

FAULTS: dict[str, tuple[float, float, float]] = {
    "blur": (0.6, 1.2, 2.5),
    "noise": (4.0, 10.0, 25.0),
    "colours": (40.0, 70.0, 110.0),
    "frozen": (1 / 3, 2 / 3, 1.0),
    "tiles": (1.0, 2.0, 4.0),
    "shuffled": (2.0, 4.0, 9.0),
    "flicker": (0.04, 0.1, 0.25),
    "photograph": (1 / 3, 2 / 3, 1.0),
    "sprite": (1 / 3, 2 / 3, 1.0),
    "motion": (1 / 3, 2 / 3, 1.0),
}
"""Faults that a person sees, with a mild, a middle and a strong amount of each, see `faulty`."""

TAUGHT: dict[str, tuple[float, float]] = {
    "blur": (0.5, 3.0),
    "noise": (3.0, 30.0),
    "shrink": (0.0, 1.0),
    "colours": (0.0, 180.0),
    "flicker": (0.03, 0.3),
    "frozen": (0.0, 1.0),
    "shuffled": (0.0, 9.0),
}
"""Faults that the network is taught, with the amount where each begins to be seen, and the strongest."""


def world_labels() -> RecognisedLabels:
    """What the clips of combinations show, in the captions' words."""
    found: dict[str, str] = {}
    for scene in draw_stage("combinations", 0, "train", 64, FRAMES, SIDE, 8):  # all parts are among as many
        assert isinstance(scene, StagedScene)
        sentences = captions(scene)["Summarized Description"].removesuffix(" .").split(" . ")
        found |= zip(scene.parts, sentences, strict=True)
    photographs = [photograph.url for photograph in STAGE if photograph.split == "train"]
    shown, moved, in_front = (("", *(found[key] for key in keys)) for keys in (photographs, MOTIONS, SPRITES))
    return RecognisedLabels(shown, moved, in_front, tuple(TAUGHT))


def faulty(scene: Scene, frames: Tensor, fault: str, amount: float) -> Tensor:
    """A clip of combinations with one fault.

    blur: standard deviation of a Gaussian in pixels. noise: standard deviation of normal noise, of 255. colours:
    rotation of the hue in degrees. frozen: share of the clip that stands still at its end. tiles: the first quarter of
    the frame repeated, at 1 in the opposite quarter only, otherwise that many times down and across (of the first part
    as small). shuffled: frames change places in groups of so many. flicker: standard deviation of each frame's
    brightness, as a factor. photograph: share of clips whose photograph is one of those held out whole. sprite: share
    of clips without their sprite. motion: share of clips whose camera trembles instead.

    Args:
        scene: what was painted; also decides the randomness.
        frames: the first of `paint_scene(scene)`, uint8 T x H x W x 3.
        fault: a key of `FAULTS`.
        amount: how much.

    Raises:
        KeyError: there is no such fault.
    """
    rng = np.random.default_rng([scene.seed, scene.index])
    if fault not in ("photograph", "sprite", "motion"):
        return _OF_FRAMES[fault](frames, amount, rng)
    # As many of the first clips as of all.
    if int((scene.index + 1) * amount + 1e-9) == int(scene.index * amount + 1e-9):
        return frames
    if fault == "sprite":
        return paint_scene(replace(scene, sprites=()))[: len(frames)]
    if fault == "photograph":
        form = scene.frames, scene.size, scene.fps
        other = next(draw_stage("photographs", scene.seed + scene.index, "test", 1, *form))
        return paint_scene(replace(other, sprites=scene.sprites))[: len(frames)]
    camera = replace(scene.camera, pan="", zoom="", turn="", distance=0.0, ratio=1.0, degrees=0.0)
    steps = rng.integers(-6, 7, size=(len(frames), 2))
    still = paint_scene(replace(scene, camera=camera))
    return torch.stack([frame.roll((int(y), int(x)), (0, 1)) for frame, (y, x) in zip(still, steps, strict=False)])


def blurred(frames: Tensor, sigma: float) -> Tensor:
    """uint8 frames T x H x W x 3, blurred by a Gaussian."""
    return video_to_frames(unsharp_mask(frames_to_video(frames)[None], sigma, -1.0)[0])


def shrunken(frames: Tensor, factor: float) -> Tensor:
    """uint8 frames T x H x W x 3, reduced and enlarged again."""
    height, width = frames.shape[1:3]
    small = resize_video(frames_to_video(frames)[None], (round(height / factor), round(width / factor)))
    return video_to_frames(resize_video(small, (height, width))[0])


def noisy(frames: Tensor, deviation: float, rng: Generator) -> Tensor:
    """uint8 frames T x H x W x 3 with normal noise, `deviation` of 255."""
    return _bytes(frames + deviation * torch.from_numpy(rng.standard_normal(frames.shape, dtype=np.float32)))


def recoloured(frames: Tensor, degrees: float) -> Tensor:
    """uint8 frames T x H x W x 3 with another hue."""
    count, height, width, _ = frames.shape
    picture = frames.permute(3, 0, 1, 2).reshape(3, count * height, width) / 255
    return _bytes(apply_grade(picture, Grade(hue=degrees)) * 255).view(3, count, height, width).permute(1, 2, 3, 0)


def frozen_from(frames: Tensor, share: float) -> Tensor:
    """The frames, the last share of which repeat the one before."""
    last = round((len(frames) - 1) * (1 - share))
    return frames[torch.arange(len(frames)).clamp(max=last)]


def flickering(frames: Tensor, deviation: float, rng: Generator) -> Tensor:
    """uint8 frames T x H x W x 3, each of another brightness."""
    factors = 1 + deviation * torch.from_numpy(rng.standard_normal(len(frames), dtype=np.float32))
    return _bytes(frames * factors.view(-1, 1, 1, 1))


def _bytes(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


def _tiled(frames: Tensor, times: int) -> Tensor:
    height, width = frames.shape[1:3]
    if times == 1:
        tiled = frames.clone()
        tiled[:, height - height // 2 :, width - width // 2 :] = frames[:, : height // 2, : width // 2]
        return tiled
    part = frames[:, : -(-height // times), : -(-width // times)]
    return part.repeat(1, times, times, 1)[:, :height, :width]


def _shuffled(frames: Tensor, group: int, rng: Generator) -> Tensor:
    order = np.arange(len(frames))
    for start in range(0, len(order), group):
        part = order[start : start + group]
        order[start : start + group] = part[::-1] if group == 2 else rng.permutation(part)
    return frames[torch.from_numpy(order)]


_OF_FRAMES: dict[str, Callable[[Tensor, float, Generator], Tensor]] = {
    "blur": lambda frames, sigma, _: blurred(frames, sigma),
    "noise": noisy,
    "colours": lambda frames, degrees, _: recoloured(frames, degrees),
    "frozen": lambda frames, share, _: frozen_from(frames, share),
    "tiles": lambda frames, times, _: _tiled(frames, int(times)),
    "shuffled": lambda frames, group, rng: _shuffled(frames, int(group), rng),
    "flicker": flickering,
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
        if fault == "shrink":
            clip = shrunken(clip, 1 + amount)
        elif fault == "shuffled":
            clip = _shuffled(clip, max(2, round(amount)), rng)
        else:
            clip = _OF_FRAMES[fault](clip, amount * sign if fault == "colours" else amount, rng)
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
        self.labels = world_labels()

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
        motion = 0 if still > 0.8 else _LEFT_OUT if still > 0.4 else 1 + list(MOTIONS).index(scene.motion)
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


class RecogniserTask(TrainingTask):
    """Trains a `Recogniser` on the world's labels.

    Args:
        lr: see `TrainingTask`.
        min_lr: see `TrainingTask`.
        weight_decay: see `TrainingTask`.
        warmup_steps: see `TrainingTask`.
        spotted: see `Recogniser`.
        init_from: a saved recogniser to go on from; its form counts, then.
    """

    def __init__(
        self,
        lr: float = 2e-3,
        min_lr: float = 1e-5,
        weight_decay: float = 0.01,
        warmup_steps: int = 30,
        spotted: int = 40,
        init_from: Path | None = None,
    ) -> None:
        super().__init__(lr, min_lr, weight_decay, warmup_steps)
        if init_from is None:
            self.net = Recogniser(world_labels(), spotted=spotted)
        else:
            self.net = load_recogniser(init_from).train().requires_grad_(True)
            if self.net.labels != world_labels():
                raise ValueError(f"init_from {init_from}: a recogniser of another world's labels")

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of each kind of label, of clips and of patches (`patch_...`)."""
        features, spots = self.net.look(batch["clips"].flatten(0, 1))
        found = self.net.of_clips(features)
        patches = batch["patches"].flatten(0, 1)
        count = patches.shape[1]
        of_patches = self.net.of_patches(self.net.patch_features(patches.flatten(0, 1)))
        target = {name: batch[name].flatten(0, 1) for name in ("photographs", "motions", "sprites", "faults")}
        losses = {name: _cross_entropy(found[name], target[name]) for name in ("photographs", "motions", "sprites")}
        if spots is not None:
            losses["spots"] = _cross_entropy(spots, target["sprites"])
        names = self.net.labels.faults
        # A change of hue does nothing to a grey photograph, and a patch shows no change in time.
        weights = torch.ones_like(target["faults"])
        weights[:, names.index("colours")] = batch["coloured"].flatten()
        still = torch.tensor([name not in ("flicker", "frozen", "shuffled") for name in names], device=weights.device)
        loss = F.binary_cross_entropy_with_logits
        losses["faults"] = 6 * loss(found["faults"], target["faults"], weights)
        each = {name: values.repeat_interleave(count, 0) for name, values in target.items()}
        seen = (weights * still).repeat_interleave(count, 0)
        losses["patch_faults"] = 6 * loss(of_patches["faults"], each["faults"], seen)
        losses["patch_photographs"] = F.cross_entropy(of_patches["photographs"], each["photographs"])
        return losses

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The sum of all losses."""
        losses = self.losses(batch)
        total = torch.stack(list(losses.values())).sum()
        self.log("train/loss", total, prog_bar=True)
        self.log_dict({f"train/{name}": loss for name, loss in losses.items()})
        return total

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Shares of clips whose photograph, motion and sprite are recognised."""
        found = self.net.answers(batch["clips"].flatten(0, 1))
        for name in ("photographs", "motions", "sprites"):
            right = found[name].argmax(1) == batch[name].flatten()
            self.log(f"val/{name}", right.float().mean(), batch_size=len(right))

    def export(self, folder: Path, datamodule: Any) -> None:
        """Write `recogniser.safetensors`."""
        self.net.save(folder / "recogniser.safetensors")


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    # All may be left out, whose mean would be NaN.
    total = F.cross_entropy(logits, targets, reduction="sum", ignore_index=_LEFT_OUT)
    return total / (targets != _LEFT_OUT).sum().clamp(min=1)
