"""The models of a cascade, made from configuration files alone on any device, and what each stage computes on them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from luve_lightning.cascade.denoise import denoise
from luve_lightning.cascade.options import Guidance
from luve_lightning.files import read_json
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.models.attention import saved_attention
from luve_lightning.models.backbones import (
    Backbone,
    LatentSpace,
    Sampler,
    Schedule,
    denoiser_of,
    family_named,
    load_backbone,
)
from luve_lightning.models.vluer import BaseVLUer, vluer_class


@dataclass(frozen=True)
class PartConfigs:
    """The contents of a backbone's and a VLUer's configuration files.

    Attributes:
        transformer: configuration of the transformer.
        vae: the VAE's.
        text_encoder: configuration of the text encoder.
        vluer: configuration of the VLUer; empty for the base size.
        refiner: arguments of the third stage's transformer; None when the first stage's serves both.
        shift: shift of the scheduler.
        text_length: tokens per prompt, padding included.
        family: the family they belong to.
        sampler: what steps through the schedule, see CascadeOptions.
    """

    transformer: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    vluer: dict[str, Any]
    refiner: dict[str, Any] | None = None
    shift: float = 5.0
    text_length: int = 512
    family: type[Backbone] = field(default_factory=lambda: family_named("wan"))
    sampler: Sampler = "backbone"

    @property
    def schedule(self) -> Schedule:
        """A new schedule with the shift, as the sampler steps through it."""
        return self.family.build_schedule(self.shift).sampled_by(self.sampler)

    @classmethod
    def from_pretrained(
        cls,
        backbone: str | Path,
        vluer: str | Path | None = None,
        refiner: str | Path | None = None,
        shift: float | None = None,
        sampler: Sampler = "backbone",
        transformer: str | Path | None = None,
    ) -> PartConfigs:
        """Read the configurations; weights are not needed.

        Args:
            backbone: pipeline folder, or a hub id whose configuration files are available (from the cache,
                offline).
            vluer: folder of a saved VLUer; None means the base size.
            refiner: another backbone, whose transformer refines; or a transformer's own folder or file.
            shift: shift of the schedule; None means the backbone's.
            sampler: what steps through it.
            transformer: the first stage's transformer instead of the backbone's, as `refiner`.

        Raises:
            FileNotFoundError: when one of the files is not available.
            ValueError: for a shift that is not positive, or a damaged attention.
        """
        parts = load_backbone(backbone)
        shift = parts.shift() if shift is None else shift
        if not 0 < shift < float("inf"):
            raise ValueError(f"shift: expected a number greater than 0, got {shift}")
        upsampler: dict[str, Any] = {}
        if vluer is not None:
            if not (Path(vluer) / "config.json").is_file():
                raise FileNotFoundError(
                    f"vluer {vluer}: no config.json there; expected a folder saved by VLUer or `luve convert vluer`"
                )
            upsampler = read_json(Path(vluer) / "config.json")
        first = backbone if transformer is None else transformer
        config = load_backbone(first).config("transformer")
        refining = None if refiner is None else load_backbone(refiner).config("transformer")
        for folder, found in ((first, config), (refiner, refining)):
            saved_attention(found or {}, folder)  # refused here, where its folder is known
        return cls(
            transformer=config,
            vae=parts.config("vae"),
            text_encoder=parts.config("text_encoder"),
            vluer=upsampler,
            refiner=refining,
            shift=shift,
            text_length=parts.text_length(),
            family=type(parts),
            sampler=sampler,
        )


def wan_1_3b() -> PartConfigs:
    """Wan2.1-T2V-1.3B and the base VLUer, for random weights of the real sizes."""
    return PartConfigs(
        transformer={
            "num_attention_heads": 12,
            "attention_head_dim": 128,
            "ffn_dim": 8960,
            "num_layers": 30,
            "text_dim": 4096,
            "freq_dim": 256,
        },
        vae={},
        text_encoder={
            "vocab_size": 256384,
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
            "feed_forward_proj": "gated-gelu",
        },
        vluer={},
    )


class Parts:
    """The models of a cascade, each made when first requested, in evaluation mode.

    Args:
        configs: their configurations.
        dtype: dtype of the transformers' and the text encoder's weights; what diffusers keeps in float32 stays so.
        device: device of the models; "meta" needs no memory, elsewhere their weights are random.
        vae_dtype: dtype of the VAE's and the VLUer's weights, float32 in `LuVePipeline` by default.
    """

    def __init__(
        self,
        configs: PartConfigs,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
        vae_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.configs, self.dtype, self.device = configs, dtype, torch.device(device)
        self.vae_dtype = vae_dtype
        self._made: dict[str, Any] = {}

    @property
    def transformer(self) -> Any:
        """The first stage's transformer."""
        return self._part("transformer", lambda: self._new("transformer", self.configs.transformer))

    @property
    def refiner(self) -> Any:
        """The third stage's transformer; the first stage's unless it has its own."""
        config = self.configs.refiner
        if config is None:
            return self.transformer
        return self._part("refiner", lambda: self._new("transformer", config))

    @property
    def codec(self) -> LatentSpace:
        """The VAE."""
        space: Any = self.configs.family.latent_space_class
        return self._part("vae", lambda: space(self._new("vae", self.configs.vae)), self.vae_dtype)

    @property
    def text_encoder(self) -> Any:
        """The captions' encoder."""
        return self._part("text_encoder", lambda: self._new("text_encoder", self.configs.text_encoder))

    @property
    def vluer(self) -> BaseVLUer:
        """The latent upsampler."""
        kind = vluer_class(self.configs.vluer)
        known = kind._get_init_keys(kind)
        config = {key: value for key, value in self.configs.vluer.items() if key in known}
        return self._part("vluer", lambda: kind(**config), self.vae_dtype)

    def _new(self, part: str, config: dict[str, Any]) -> nn.Module:
        module = self.configs.family.from_config(part, config)
        attention = saved_attention(config) if part == "transformer" else None
        if attention is not None:
            denoiser_of(module).use_attention(attention)
        return module

    def names(self) -> list[str]:
        """Every existing part, whether made or not."""
        refiner = [] if self.configs.refiner is None else ["refiner"]
        return ["text_encoder", "transformer", *refiner, "vae", "vluer"]

    def module(self, name: str) -> nn.Module:
        """A part by its name in `names`."""
        part: nn.Module = self.codec if name == "vae" else getattr(self, name)
        return part

    def forget(self, *names: str) -> None:
        """Free parts."""
        for name in names:
            self._made.pop(name, None)

    def _part(self, name: str, make: Callable[[], Any], dtype: torch.dtype | None = None) -> Any:
        if name not in self._made:
            with self.device:
                part = make().eval().requires_grad_(False)
            cast_weights(part, dtype or self.dtype)
            self._made[name] = part
        return self._made[name]


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Give weights the dtype that `from_pretrained(torch_dtype=...)` gives them, in place.

    Buffers keep theirs, and so do the modules that diffusers keeps in float32 (transformers does so for float16
    only).
    """
    keeps = isinstance(module, ModelMixin) or dtype == torch.float16
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ()) if keeps else set()
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)


DenoisingStage = Literal["motion", "refine"]


def encode_prompt(parts: Parts, length: int | None = None, batch: int = 1) -> Tensor:
    """The text encoder on padded prompts, by default one of the backbone's length."""
    tokens = torch.zeros(batch, length or parts.configs.text_length, dtype=torch.long, device=parts.device)
    return parts.configs.family.text_class.states(parts.text_encoder, tokens, torch.ones_like(tokens))


class StepProgram:
    """One denoising step in the middle of a run, when the scheduler remembers earlier steps.

    Args:
        parts: its transformer, or its refiner, runs.
        stage: "motion" or "refine".
        grid: latent frames, height and width.
        steps: steps of the whole schedule.
        skip: number of first steps left out.
        guidance: see Guidance.
        among: places in the schedule from which the step is chosen; None means all from `skip` on.
    """

    def __init__(
        self,
        parts: Parts,
        stage: DenoisingStage,
        grid: Size3d,
        steps: int,
        skip: int = 0,
        guidance: Guidance | None = None,
        among: Collection[int] | None = None,
    ) -> None:
        self.transformer = parts.transformer if stage == "motion" else parts.refiner
        self.guidance = guidance or Guidance()
        denoiser, device = denoiser_of(self.transformer), parts.device
        text = (1, parts.configs.text_length, denoiser.text_dim)
        self.latents = torch.randn(1, denoiser.channels, *grid, device=device)
        self.condition = torch.randn_like(self.latents) if denoiser.conditioned else None
        self.embeds = torch.randn(text, device=device).to(denoiser.dtype)
        self.negative = torch.randn(text, device=device).to(denoiser.dtype)
        # Timesteps have values, which the meta device lacks.
        where = torch.device("cpu") if device.type == "meta" else device
        schedule = parts.configs.schedule
        self.remembered, self.scheduler = schedule.remembered, schedule.scheduler
        self.timestep_dtype = schedule.timestep_dtype
        self.scheduler.set_timesteps(steps, device=where)
        self.index = self._place(skip, range(skip, steps) if among is None else among)
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
            timestep_dtype=self.timestep_dtype,
            condition=self.condition,
        )

    def tensors(self) -> list[Tensor]:
        """Tensors held besides the weights."""
        outputs = getattr(self.scheduler, "model_outputs", ())
        remembered = [tensor for tensor in outputs if tensor is not None]
        given = [] if self.condition is None else [self.condition]
        return [self.latents, *given, self.embeds, self.negative, *remembered]

    def _place(self, skip: int, among: Collection[int]) -> int:
        """A guided step, if there is one, with as many steps before it as the scheduler remembers, if possible."""
        sigmas = self.scheduler.sigmas.tolist()

        def rank(i: int) -> tuple[bool, int, int]:
            return self.guidance.at(sigmas[i]), min(i - skip, self.remembered), -i

        return max(among, key=rank)


def decode(parts: Parts, latents: Tensor, tile: tuple[int, int] | None, out: Tensor | None = None) -> Tensor:
    """The video of normalised latents.

    Args:
        parts: its VAE decodes.
        latents: float32, B x C x t x h x w.
        tile: greatest height and width of a tile in latents; None decodes whole frames.
        out: where whole frames go, see `LatentSpace.decode`.
    """
    codec = parts.codec
    if tile is None:
        return codec.decode(latents, out=out)
    return codec.decode_in_tiles(latents, tile)
