"""LaVie's video super-resolution: diffusion from noise beside the low-resolution latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luve_lightning.functional.noise_bands import noise_augmented
from luve_lightning.models.backbones import Denoiser
from luve_lightning.tasks.enhancement import EnhancementTask
from luve_lightning.tasks.flow import clip_noise


class LaVieTask(EnhancementTask):
    """Trains the super-resolution of LaVie (arXiv 2309.15103): low-resolution latents beside the noised ones.

    The path is that of every diffusion model here, from the clean latents to noise; the transformer predicts

        velocity(concat(x_sigma, sqrt(1 - s^2) * upsampled + s * noise'))

    from twice the channels, so that it is told the low resolution at every noise level. The weights of the new
    channels start at zero, where the transformer still is the one that it was.

    As in the paper: the concatenation along channels, pure noise at the start, text, and noise on the condition; s up
    to 0.6 is level 350 of the image upscaler that LaVie's starts from. Adapted: that network is a U-Net on pixels'
    latents and gets the low resolution as pixels; here both are latents of one VAE, the low ones upsampled as in this
    cascade, and the whole clip is one sample, where its released code goes on eight frames at a time. Left out: layers
    for time, which the backbone has, the level of s as an input, and the joint training on pictures.

    Args:
        backbone: see EnhancementTask; one that takes a condition already goes on with it.
        strength: see EnhancementTask; s above.
        options: those of EnhancementTask.
    """

    refinement = "lavie"

    def __init__(self, backbone: str, strength: tuple[float, float] = (0.0, 0.6), **options: Any) -> None:
        super().__init__(backbone, strength=strength, **options)

    @classmethod
    def set_up(cls, denoiser: Denoiser, lora_rank: int) -> None:
        """See AdaptationTask."""
        denoiser.take_condition()
        super().set_up(denoiser, lora_rank)

    def path_of(
        self, batch: dict[str, Any], noise: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See FlowMatchingTask."""
        upsampled, strengths = self.upsampled(batch), self.strengths(len(noise), generator)
        if generator is None:
            # The parts of the band have the numbers below `bins`.
            other = torch.stack([clip_noise(clip, self.bins, noise.shape[1:]) for clip in batch["clip_id"]]).to(noise)
        else:
            other = torch.randn(noise.shape, generator=generator, device=noise.device)
        return noise, {"condition": noise_augmented(upsampled, other, strengths)}
