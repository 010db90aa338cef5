"""Training one frequency expert on a frozen, adapted transformer."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from luve_lightning.functional.gather import gather_mappings
from luve_lightning.functional.noise_bands import Weighting
from luve_lightning.losses import Loss
from luve_lightning.models.backbones import Recompute, load_backbone
from luve_lightning.models.experts import (
    ExpertConfig,
    activate,
    add_expert,
    expert_parameters,
    load_expert,
    save_expert,
    train_only,
)
from luve_lightning.models.experts.routing import state_of
from luve_lightning.tasks.flow import FlowMatchingTask


class ExpertTask(FlowMatchingTask):
    """Trains one of LuVe's experts by flow matching, only at the noise levels of its band.

    Levels outside the band cannot occur: `SigmaBand.sample` draws none. The test compares the expert with its
    base, expert disabled, on the same clips, noise levels and noise.

    Args:
        backbone: backbone folder, a transformer's own (as the adaptation exports it), or a hub id.
        expert: the expert's place, rank, filter and band.
        name: name of the PEFT adapter: "lfe", "hfe" or your own.
        init_from: folder saved by `save_expert` to continue from; its configuration must equal `expert`.
        dtype: dtype of the frozen transformer, "float32" or "bfloat16"; the expert itself trains in float32.
        recompute: see `Denoiser.set_recompute`.
        keep_attention: see `Denoiser.set_recompute`.
        shift: see FlowMatchingTask.
        weighting: see FlowMatchingTask.
        bins: see FlowMatchingTask.
        seed: see FlowMatchingTask; the expert's initial weights follow the run's `seed_everything`.
        lr: see TrainingTask; LuVe trains experts with 1e-4.
        min_lr: see TrainingTask.
        weight_decay: see TrainingTask.
        warmup_steps: see TrainingTask.
        losses: see FlowMatchingTask.
    """

    def __init__(
        self,
        backbone: str,
        expert: ExpertConfig,
        name: str,
        init_from: str | None = None,
        dtype: str = "float32",
        recompute: Recompute = "nothing",
        keep_attention: int | None = None,
        shift: float = 5.0,
        weighting: Weighting | None = None,
        bins: int = 5,
        seed: int = 0,
        lr: float = 1e-4,
        min_lr: float = 1e-6,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        losses: dict[str, Loss] | None = None,
    ) -> None:
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype: expected float32 or bfloat16, got {dtype!r}")
        denoiser = load_backbone(backbone).denoiser(getattr(torch, dtype))
        transformer = denoiser.module
        if init_from is None:
            add_expert(transformer, name, expert, dtype=torch.float32)
        else:
            _continue_expert(transformer, name, expert, init_from)
        denoiser.set_recompute(recompute, keep_attention)
        super().__init__(
            transformer,
            expert.band,
            shift,
            weighting,
            bins,
            seed,
            lr,
            min_lr,
            weight_decay,
            warmup_steps,
            losses,
        )
        self.name, self.expert = name, expert
        self._before: dict[tuple[str, int], float] = {}
        self._after: dict[tuple[str, int], float] = {}
        self.comparison: dict[str, tuple[float, float]] = {}

    def _identity(self) -> str:
        return json.dumps({"name": self.name} | asdict(self.expert), sort_keys=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save which expert the weights belong to: another filter or band has the same shapes."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["expert"] = self._identity()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another expert's checkpoint."""
        saved, own = json.loads(checkpoint.get("expert", "{}")), json.loads(self._identity())
        differs = [
            f"{key} {saved[key]} there, {own[key]} here"
            for key in own
            if saved.get(key, own[key]) != own[key]
        ]
        if differs:
            raise ValueError(f"checkpoint is of another expert: {'; '.join(differs)}")
        super().on_load_checkpoint(checkpoint)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Losses of held-out clips in the expert's band, without and with it."""
        del batch_idx
        activate(self.transformer, None)
        self._before |= self.fixed_losses(batch)
        activate(self.transformer, self.name)
        self._after |= self.fixed_losses(batch)

    def on_test_epoch_end(self) -> None:
        """Mean losses; `comparison` keeps each clip's for reports."""
        before, after = gather_mappings(self._before), gather_mappings(self._after)
        self._before, self._after = {}, {}
        clips = sorted({clip for clip, _ in before})
        self.comparison = {
            clip: (
                math.fsum(before[clip, part] for part in range(self.bins)) / self.bins,
                math.fsum(after[clip, part] for part in range(self.bins)) / self.bins,
            )
            for clip in clips
        }
        for name, column in zip(
            ("before", "after"), zip(*self.comparison.values(), strict=True), strict=True
        ):
            self.log(f"test/loss_{name}", math.fsum(column) / len(column), sync_dist=True)

    def export(self, folder: Path, datamodule: Any) -> None:
        """Save the expert: PEFT's two files and `expert.json`.

        Args:
            folder: where to.
            datamodule: not needed.
        """
        del datamodule
        save_expert(self.transformer, self.name, folder)


def _continue_expert(transformer: Any, name: str, expert: ExpertConfig, folder: str) -> None:
    """Load an expert to train on, in float32."""
    load_expert(transformer, folder, name)
    found = state_of(transformer, name).configs[name]
    for key in ("places", "rank", "alpha", "filter", "band"):
        saved, wanted = getattr(found, key), getattr(expert, key)
        if saved != wanted:
            raise ValueError(f"init_from: the expert in {folder} has {key} {saved}, `expert` says {wanted}")
    train_only(transformer, name)
    for parameter in expert_parameters(transformer, name):
        parameter.data = parameter.data.float()
