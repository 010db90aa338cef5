"""Training of the network that recognises what the mini world's clips show, and how they were spoilt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luve_lightning.data.mini_world import captions
from luve_lightning.data.mini_world.scene import STAGE
from luve_lightning.data.mini_world.stage import MOTIONS, SPRITES, StagedScene, draw_stage
from luve_lightning.models.recogniser import (
    FRAMES,
    LEFT_OUT,
    SIDE,
    TAUGHT,
    RecognisedLabels,
    Recogniser,
    load_recogniser,
)
from luve_lightning.tasks.base import TrainingTask


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
    total = F.cross_entropy(logits, targets, reduction="sum", ignore_index=LEFT_OUT)
    return total / (targets != LEFT_OUT).sum().clamp(min=1)
