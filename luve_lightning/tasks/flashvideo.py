"""FlashVideo's second stage: flow matching from degraded low-resolution latents to the clean ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luve_lightning.functional.noise_bands import noise_augmented
from luve_lightning.tasks.enhancement import EnhancementTask


class FlashVideoTask(EnhancementTask):
    """Trains the straight flow from low to high resolution of FlashVideo (arXiv 2502.05179).

    The path ends not at noise but at the upsampled latents with noise on them,

        end = sqrt(1 - s^2) * upsampled + s * noise,    x_sigma = (1 - sigma) * clean + sigma * end,

    and the transformer learns its velocity, end - clean. Because low and high resolution lie close together, few steps
    follow the path; `cascade.refinement.enhancement` takes them.

    As in the paper: this path, the noise (steps 650 to 750 of its DDPM schedule are s from 0.956 to 0.983), the shift
    of its sampler, 2.5. Adapted: the low-resolution latents are upsampled as in this cascade, where the paper enlarges
    pixels and encodes them; sigmas are drawn uniformly in the shifted schedule, because its training code is not
    published. The paper's degradation of pixels is a version of the clips, `data.low_variant`. Left out: the embeddings
    that tell its transformer how much noise was added, and how large the video is.

    Args:
        backbone: see EnhancementTask.
        strength: see EnhancementTask; s above.
        shift: shift of the schedule in which sigmas are drawn.
        options: those of EnhancementTask.
    """

    refinement = "flashvideo"

    def __init__(
        self, backbone: str, strength: tuple[float, float] = (0.956, 0.983), shift: float = 2.5, **options: Any
    ) -> None:
        super().__init__(backbone, strength=strength, shift=shift, **options)

    def path_of(
        self, batch: dict[str, Any], noise: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See FlowMatchingTask."""
        return noise_augmented(self.upsampled(batch), noise, self.strengths(len(noise), generator)), {}
