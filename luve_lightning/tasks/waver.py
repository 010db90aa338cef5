"""Waver's refiner: flow matching from a blend of low-resolution latents and noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luve_lightning.functional.noise_bands import noised
from luve_lightning.tasks.enhancement import EnhancementTask


class WaverTask(EnhancementTask):
    """Trains the cascade refiner of Waver (arXiv 2508.15761).

    The path ends at a blend of the upsampled latents and noise,

        end = (1 - w) * upsampled + w * noise,    x_sigma = (1 - sigma) * clean + sigma * end,

    with w from 0.85 to 0.95, and the transformer learns its velocity, end - clean (the paper's has the other sign).
    Its self-attention stays within windows: give `attention`, for instance `Windows`. The export keeps it.

    As in the paper, whose formula and w come from a description of it, not from the paper itself: path, target, w,
    window attention. Adapted: the low-resolution latents are upsampled as in this
    cascade; windows are those of `models.attention.windows`, cut as the configuration says; the degradation of what is
    upsampled is a version of the clips, `data.low_variant`. Left out: its own backbone, and its use to edit videos.

    Args:
        backbone: see EnhancementTask.
        strength: see EnhancementTask; w above.
        options: those of EnhancementTask.
    """

    refinement = "waver"

    def __init__(self, backbone: str, strength: tuple[float, float] = (0.85, 0.95), **options: Any) -> None:
        super().__init__(backbone, strength=strength, **options)

    def path_of(
        self, batch: dict[str, Any], noise: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See FlowMatchingTask."""
        return noised(self.upsampled(batch), noise, self.strengths(len(noise), generator)), {}
