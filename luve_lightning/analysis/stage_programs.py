"""A dry run of `decode_tiled` that does not repeat itself: 40 tiles of 13 chunks at 4K are a dozen kinds of tile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn

from luve_lightning.analysis.dry_run import DryRun
from luve_lightning.analysis.model_parts import Parts
from luve_lightning.cascade.denoise import denoise
from luve_lightning.cascade.options import Guidance
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.models.tiled_decode import decode_tiled, decoder_layers
from luve_lightning.models.transformer import flow_scheduler
from luve_lightning.models.wan_tiles import Span, TileRun, frame_sizes, spread, trace, whole_frames

_DISTINCT = 3  # chunks of a tile that differ: the first, the second, all others
_Lengths = tuple[int, ...]


def dry_decode_tiled(run: DryRun, vae: AutoencoderKLWan, latents: Tensor, tile: tuple[int, int]) -> None:
    """Count what `decode_tiled(vae, latents, tile)` takes.

    Tiles of which every layer sees the same sizes are run once and counted together; so are the chunks of a tile after
    its second, which differ from the first two only.

    Args:
        run: of the dry run this is called in.
        vae: on the meta device.
        latents: denormalised, in the VAE's dtype.
        tile: greatest height and width of a tile in latents.
    """
    whole, tiled = decoder_layers(vae)
    z = vae.post_quant_conv(latents)
    batch, _, frames, h, w = z.shape
    patch = vae.config.patch_size or 1
    height, width = (frame_sizes(tiled, n)[-1] for n in (h, w))
    length = (frames - 1) * vae.config.scale_factor_temporal + 1
    channels = vae.config.out_channels // patch**2
    out = latents.new_empty(batch, channels, length, height * patch, width * patch)
    features = whole_frames(whole, z.split(1, dim=2))
    kinds: dict[_Lengths, list[Any]] = {}
    for tile_rows, tile_columns in product(spread(h, tile[0]), spread(w, tile[1])):
        rows = trace(tiled, _times(tile_rows, height // h), h)
        columns = trace(tiled, _times(tile_columns, width // w), w)
        lengths = tuple(stop - start for start, stop in (*rows, *columns))
        kinds.setdefault(lengths, [TileRun(tiled, rows, columns), 0])[1] += 1
    part = None  # the last one lives until the next is made, as in `decode_tiled`
    for tile_run, count in kinds.values():
        for index, frame in enumerate(features[:_DISTINCT]):
            with run.times(count * (len(features) - index if index == _DISTINCT - 1 else 1)):
                part = tile_run(frame[..., slice(*tile_run.rows[0]), slice(*tile_run.columns[0])])
                _write(out, unpatchify(part, patch).clamp(-1, 1))
        # Gone before the next tile starts, whose TileRun replaces this one there.
        tile_run.histories.clear()


def _write(out: Tensor, video: Tensor) -> None:
    frames, height, width = video.shape[2:]
    out[:, :, :frames, :height, :width] = video.to(out)


def _times(span: Span, factor: int) -> Span:
    return span[0] * factor, span[1] * factor


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


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes. Memory is in bytes.

    Attributes:
        stage: "text", "motion" (or "direct"), "upsample", "refine", "decode".
        latents: frames, height and width of its result, or of what it decodes; None for text.
        tokens: of the transformer in one forward pass.
        steps: of denoising.
        forwards: passes of the transformer, or of the text encoder.
        flops_per_forward: floating-point operations of one.
        flops: of the stage.
        weights: of the models on the device.
        activations: what the stage allocates at its peak.
        workspace: of cuBLAS and, where they count, of attention and convolutions.
        peak: the sum of the three.
        terms: what the activations are made by, the largest first.
        experts: denoising steps by expert; "none" where the transformer runs alone.
        seconds: estimated; None without a GPU's speed.
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
        """Plain types, for JSON."""
        return asdict(self)
