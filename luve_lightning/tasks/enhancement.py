"""The base of the cascades that only enhance: pairs of latents of one clip, low and high resolution."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from luve_lightning.functional.interpolation import Size3d, interpolate_latents
from luve_lightning.models.backbones import Denoiser
from luve_lightning.models.vluer import BaseVLUer, load_vluer
from luve_lightning.tasks.expert import AdaptationTask


class EnhancementTask(AdaptationTask):
    """Trains a transformer to make clean latents of upsampled low-resolution ones of the same clip.

    A subclass says by `path_of` how the low-resolution latents enter. Batches also hold "low" (B x C x t x h' x w',
    normalised), see `CaptionLatentsDataModule.low_scale`. In validation the noise on them has the middle of `strength`.

    What is exported is a transformer that `luve generate` takes as its refiner, with the refinement that it names.

    Args:
        backbone: the transformer to start from, for instance what AdaptationTask exported; see there.
        vluer: folder of the VLUer that upsamples the low-resolution latents, as in the cascade's second stage; None
            interpolates them linearly, as its method "latent" does.
        strength: least and most strength of the noise on the upsampled latents, in [0, 1]; drawn uniformly for each
            sample.
        lora_rank: rank of a LoRA in every linear layer of the blocks, 0 trains all weights. Beside a LoRA the layer
            that makes tokens of latents trains whole, because its input is of another kind.
        options: those of AdaptationTask.
    """

    refinement: ClassVar[str]
    """Name of the method in `cascade.refinement` that uses the transformer."""

    def __init__(
        self,
        backbone: str,
        vluer: str | None = None,
        strength: tuple[float, float] = (0.0, 1.0),
        lora_rank: int = 0,
        **options: Any,
    ) -> None:
        if not 0 <= strength[0] <= strength[1] <= 1:
            raise ValueError(f"strength: expected two numbers, 0 <= least <= most <= 1, got {list(strength)}")
        super().__init__(backbone, lora_rank=lora_rank, **options)
        self.strength = (float(strength[0]), float(strength[1]))
        self.vluer_folder, self.vluer = vluer, None if vluer is None else self._upsampler(vluer)

    def _upsampler(self, folder: str) -> BaseVLUer:
        net = load_vluer(folder)
        if net.config.latent_channels != self.denoiser.channels:
            raise ValueError(
                f"vluer: {folder} has {net.config.latent_channels} latent channels, the transformer takes "
                f"{self.denoiser.channels}"
            )
        return net.requires_grad_(False).eval()

    @classmethod
    def set_up(cls, denoiser: Denoiser, lora_rank: int) -> None:
        """See AdaptationTask."""
        denoiser.train_for(cls.refinement)
        super().set_up(denoiser, lora_rank)
        for parameter in denoiser.embedding_parameters:
            parameter.requires_grad_(True)

    def _schedule(self) -> dict[str, Any]:
        """What a resumed run says when it differs: also the strength, and what upsamples."""
        return super()._schedule() | {"strength": list(self.strength), "vluer": str(self.vluer_folder)}

    def upsampled(self, batch: dict[str, Any]) -> Tensor:
        """The batch's low-resolution latents at the size of the others, float32; the batch keeps them.

        Raises:
            ValueError: when the data bring none.
        """
        if "low" not in batch:
            raise ValueError("data.low_scale: expected the scale of the low-resolution latents, such as 2, got none")
        if "upsampled" not in batch:  # validation asks for each noise level
            low, size = batch["low"].float(), _size(batch["latents"])
            with torch.no_grad():
                if self.vluer is None:
                    batch["upsampled"] = interpolate_latents(low, size, "bilinear")
                else:
                    batch["upsampled"] = self.vluer(low.to(self.vluer.dtype), size).float()
        found: Tensor = batch["upsampled"]
        return found

    def strengths(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Strengths of the noise on `count` samples, float32; all the middle one without a generator."""
        least, most = self.strength
        if generator is None:
            return torch.full((count,), (least + most) / 2, device=self.device)
        return least + (most - least) * torch.rand(count, generator=generator, device=self.device)


def _size(latents: Tensor) -> Size3d:
    return latents.shape[2], latents.shape[3], latents.shape[4]
