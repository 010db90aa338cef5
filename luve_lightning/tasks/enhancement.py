"""Cascades that only enhance, trained on pairs of latents of one clip, low and high: their base, and rivals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from luve_lightning.functional.interpolation import Size3d, interpolate_latents
from luve_lightning.functional.noise_bands import noise_augmented, noised
from luve_lightning.models.backbones import Denoiser
from luve_lightning.models.vluer import BaseVLUer, load_vluer
from luve_lightning.tasks.expert import AdaptationTask
from luve_lightning.tasks.flow import clip_noise


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
    def set_up(cls, denoiser: Denoiser, lora_rank: int, lora_ranks: Mapping[str, int] | None = None) -> None:
        """See AdaptationTask."""
        denoiser.train_for(cls.refinement)
        super().set_up(denoiser, lora_rank, lora_ranks)
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
    def set_up(cls, denoiser: Denoiser, lora_rank: int, lora_ranks: Mapping[str, int] | None = None) -> None:
        """See AdaptationTask."""
        denoiser.take_condition()
        super().set_up(denoiser, lora_rank, lora_ranks)

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


def _size(latents: Tensor) -> Size3d:
    return latents.shape[2], latents.shape[3], latents.shape[4]
