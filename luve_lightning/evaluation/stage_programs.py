"""What each stage of a cascade computes, on models of any device: planned on the meta device, measured on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from luve_lightning.evaluation.model_parts import Parts
from luve_lightning.evaluation.upsampling_methods import rgb_bicubic
from luve_lightning.functional.interpolation import Size3d, interpolate_latents
from luve_lightning.models.tiled_decode import decode_tiled
from luve_lightning.models.transformer import flow_scheduler
from luve_lightning.pipelines.denoise import Guidance, denoise

UpsampleMethod = Literal["vluer", "latent", "rgb"]
DenoisingStage = Literal["motion", "refine"]

_REMEMBERED = 2  # velocities that UniPC, of second order, looks back on


def encode_prompt(parts: Parts) -> Tensor:
    """The text encoder on one padded prompt."""
    tokens = torch.zeros(1, parts.configs.text_length, dtype=torch.long, device=parts.device)
    # A padded prompt has a mask, which the encoder would look into; it adds half a megabyte.
    encoded: Tensor = parts.text_encoder(tokens).last_hidden_state
    return encoded


class StepProgram:
    """One denoising step in the middle of a run: the scheduler remembers the steps before it.

    Args:
        parts: its transformer, or its refiner, is run.
        stage: "motion" or "refine".
        grid: latent frames, height and width.
        steps: of the whole schedule.
        skip: how many of the first are left out.
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
        config, device = self.transformer.config, parts.device
        text = (1, parts.configs.text_length, config.text_dim)
        self.latents = torch.randn(1, config.in_channels, *grid, device=device)
        self.embeds = torch.randn(text, device=device).to(self.transformer.dtype)
        self.negative = torch.randn(text, device=device).to(self.transformer.dtype)
        # Timesteps have values, which the meta device has not.
        where = torch.device("cpu") if device.type == "meta" else device
        self.scheduler = flow_scheduler(parts.configs.shift)
        self.scheduler.set_timesteps(steps, device=where)
        self.index = self._place(skip, steps)
        before = range(max(skip, self.index - _REMEMBERED), self.index)
        self.scheduler.set_begin_index(before.start)
        for i in before:
            v = torch.randn_like(self.latents)
            self.latents = self.scheduler.step(v, self.scheduler.timesteps[i], self.latents)[0]

    @property
    def guided(self) -> bool:
        """Whether the step has two predictions."""
        return self.guidance.at(float(self.scheduler.sigmas[self.index]))

    def __call__(self, expert: str | None = None) -> Tensor:
        """Take the step; always the same one."""
        self.scheduler._step_index = self.index
        with _timesteps_beside(self.transformer):
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
        """What is held besides the weights."""
        remembered = [tensor for tensor in self.scheduler.model_outputs if tensor is not None]
        return [self.latents, self.embeds, self.negative, *remembered]

    def _place(self, skip: int, steps: int) -> int:
        """A step that is guided, if any is, and has as many before it as the scheduler remembers, if one has."""
        sigmas = self.scheduler.sigmas.tolist()

        def rank(i: int) -> tuple[bool, int, int]:
            return self.guidance.at(sigmas[i]), min(i - skip, _REMEMBERED), -i

        return max(range(skip, steps), key=rank)


def upsample(parts: Parts, latents: Tensor, size: Size3d, method: UpsampleMethod) -> Tensor:
    """Latents of the second stage, float32, by the VLUer or what it is compared with."""
    if method == "vluer":
        return parts.vluer(latents, size)
    if method == "latent":
        return interpolate_latents(latents, size, "bilinear")
    return rgb_bicubic(parts.codec, latents, size)


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
    return decode_tiled(codec.vae, codec.denormalize(latents).to(codec.dtype), tile)


@contextmanager
def _timesteps_beside(transformer: nn.Module) -> Iterator[None]:
    """Hand timesteps to a transformer on its own device."""
    device = next(transformer.parameters()).device

    def move(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"timestep": kwargs["timestep"].to(device)}

    hook = transformer.register_forward_pre_hook(move, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
