"""What each stage of a cascade computes, on models of any device: planned on the meta device, measured on a GPU."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from luve_lightning.analysis.model_parts import Parts
from luve_lightning.cascade.denoise import denoise
from luve_lightning.cascade.options import Guidance
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.models.backbones import denoiser_of

DenoisingStage = Literal["motion", "refine"]


def encode_prompt(parts: Parts) -> Tensor:
    """The text encoder on one padded prompt."""
    tokens = torch.zeros(1, parts.configs.text_length, dtype=torch.long, device=parts.device)
    # A padded prompt has a mask, which the encoder would read; it adds half a megabyte.
    return parts.configs.family.text_class.states(parts.text_encoder, tokens)


class StepProgram:
    """One denoising step in the middle of a run, when the scheduler remembers earlier steps.

    Args:
        parts: its transformer, or its refiner, runs.
        stage: "motion" or "refine".
        grid: latent frames, height and width.
        steps: steps of the whole schedule.
        skip: number of first steps left out.
        guidance: see Guidance.
    """

    def __init__(
        self,
        parts: Parts,
        stage: DenoisingStage,
        grid: Size3d,
        steps: int,
        skip: int = 0,
        guidance: Guidance | None = None,
    ) -> None:
        self.transformer = parts.transformer if stage == "motion" else parts.refiner
        self.guidance = guidance or Guidance()
        denoiser, device = denoiser_of(self.transformer), parts.device
        text = (1, parts.configs.text_length, denoiser.text_dim)
        self.latents = torch.randn(1, denoiser.channels, *grid, device=device)
        self.embeds = torch.randn(text, device=device).to(denoiser.dtype)
        self.negative = torch.randn(text, device=device).to(denoiser.dtype)
        # Timesteps have values, which the meta device lacks.
        where = torch.device("cpu") if device.type == "meta" else device
        self.remembered, self.scheduler = parts.configs.schedule.remembered, parts.configs.schedule.scheduler
        self.scheduler.set_timesteps(steps, device=where)
        self.index = self._place(skip, steps)
        before = range(max(skip, self.index - self.remembered), self.index)
        self.scheduler.set_begin_index(before.start)
        for i in before:
            v = torch.randn_like(self.latents)
            self.latents = self.scheduler.step(v, self.scheduler.timesteps[i], self.latents)[0]

    @property
    def guided(self) -> bool:
        """Whether the step has two predictions."""
        return self.guidance.at(float(self.scheduler.sigmas[self.index]))

    def __call__(self, expert: str | None = None) -> Tensor:
        """Run the step; always the same one."""
        self.scheduler._step_index = self.index
        return denoise(
            self.transformer,
            self.scheduler,
            self.latents,
            self.scheduler.timesteps[self.index : self.index + 1],
            self.embeds,
            self.negative,
            self.guidance,
            begin_index=self.index,
            choose_expert=None if expert is None else lambda _: expert,
        )

    def tensors(self) -> list[Tensor]:
        """Tensors held besides the weights."""
        outputs = getattr(self.scheduler, "model_outputs", ())
        remembered = [tensor for tensor in outputs if tensor is not None]
        return [self.latents, self.embeds, self.negative, *remembered]

    def _place(self, skip: int, steps: int) -> int:
        """A guided step, if there is one, with as many steps before it as the scheduler remembers, if possible."""
        sigmas = self.scheduler.sigmas.tolist()

        def rank(i: int) -> tuple[bool, int, int]:
            return self.guidance.at(sigmas[i]), min(i - skip, self.remembered), -i

        return max(range(skip, steps), key=rank)


def decode(parts: Parts, latents: Tensor, tile: tuple[int, int] | None) -> Tensor:
    """The video of normalised latents.

    Args:
        parts: its VAE decodes.
        latents: float32, B x C x t x h x w.
        tile: greatest height and width of a tile in latents; None decodes whole frames.
    """
    codec = parts.codec
    if tile is None:
        return codec.decode(latents)
    return codec.decode_in_tiles(latents, tile)


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes. Memory is in bytes.

    Attributes:
        stage: "text", "motion" (or "direct"), "upsample", "refine", "decode".
        latents: frames, height and width of its result, or of what it decodes; None for text.
        tokens: tokens in one forward pass of the transformer.
        steps: number of denoising steps.
        forwards: number of passes of the transformer, or of the text encoder.
        flops_per_forward: floating-point operations of one pass.
        flops: floating-point operations of the stage.
        weights: weights on the device.
        activations: the stage's own allocations at its peak.
        workspace: workspace of cuBLAS and, where they count, of attention and convolutions.
        peak: sum of the three.
        terms: what makes up the activations, the largest first.
        experts: denoising steps by expert; "none" where the transformer runs alone.
        seconds: estimated duration; None without a GPU's speed.
    """

    stage: str
    latents: Size3d | None
    tokens: int | None
    steps: int
    forwards: int
    flops_per_forward: int
    flops: int
    weights: int
    activations: int
    workspace: int
    peak: int
    terms: dict[str, int]
    experts: dict[str, int] = field(default_factory=dict)
    seconds: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain types, for JSON."""
        return asdict(self)
