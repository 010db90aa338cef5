"""Refinements that grow in levels, from the first stage's size to the video's: their base, and CineScale.

CineScale denoises each level whole, by the unchanged transformer with its positions and attention rescaled.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luve_lightning.cascade.refinement import Refinement, RefiningSteps
from luve_lightning.cascade.run import RefinementRun
from luve_lightning.cascade.stages import check_method, check_tokens, upsample
from luve_lightning.cascade.upsampling import upsampling_method
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.models.backbones import denoiser_of

if TYPE_CHECKING:
    from luve_lightning.cascade.options import CascadeOptions
    from luve_lightning.cascade.pipeline import LuVePipeline

UNIT = 2
"""Levels have a multiple of these latent rows and columns: one or two tokens of any family so far."""


@dataclass(frozen=True)
class ProgressiveRefinement(Refinement):
    """Levels between the first stage's size and the video's: sides grow by equal amounts, for any ratio of the two.

    One level is the video's size, and starts from the second stage's latents. Of several, the first starts from the
    first stage's latents, each later one from those of the level before, upsampled by `between`; the second stage's are
    not used then. Each takes all steps of the schedule but the skipped ones.

    Attributes:
        levels: number of levels, >= 1.
        between: upsampling method between levels.
    """

    levels: int = 1
    between: str = "bilinear"

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise ValueError(f"levels: expected at least 1, got {self.levels}")
        try:
            upsampling_method(self.between)
        except ValueError as error:
            raise ValueError(f"between: {error}") from None

    @abstractmethod
    def level(self, given: RefinementRun, native: Size3d) -> Tensor:
        """One level's latents, from `given`'s upsampled ones; `native` is the latent size of the first stage."""

    def refined(self, given: RefinementRun) -> Tensor:
        """See Refinement.

        Raises:
            ValueError: without the first stage's latents.
        """
        pipeline, motion = given.pipeline, given.known_motion
        native = grid_of(motion)
        sizes = self.sizes(native, grid_of(given.latents))
        current = motion.to(given.device, torch.float32)
        for level in sizes:
            if len(sizes) == 1:
                start = given.latents.to(current)
            else:
                frames, height, width = pipeline.codec.pixel_size(*level)
                start = upsample(pipeline, current, (height, width), frames, self.between)
            current = self.level(replace(given, latents=start), native)
        return current

    def sizes(self, native: Size3d, size: Size3d) -> list[Size3d]:
        """Latent sizes of the levels; the last is `size`."""
        found: list[Size3d] = []
        for number in range(1, self.levels):
            sides = [
                UNIT * max(1, round((a + (b - a) * number / self.levels) / UNIT))
                for a, b in zip(native[1:], size[1:], strict=True)
            ]
            found.append((size[0], sides[0], sides[1]))
        return [*found, size]

    def steps(self, steps: int, skip: int) -> int:
        """See Refinement."""
        return self.levels * (steps - skip)

    def passes(self, native: Size3d, size: Size3d) -> list[tuple[Size3d, int]]:
        """Latent sizes of the forward passes of a step at a level, and how many there are of each."""
        del native
        return [(size, 1)]

    def planned(self, motion: Size3d, size: Size3d, steps: int, skip: int) -> list[RefiningSteps]:
        """See Refinement."""
        if skip == steps:
            return []
        return [
            RefiningSteps(grid, steps, skip, count, further=number > 0)
            for level in self.sizes(motion, size)
            for number, (grid, count) in enumerate(self.passes(motion, level))
        ]

    def check(self, pipeline: LuVePipeline, options: CascadeOptions) -> None:
        """Refuse a method between levels whose model the pipeline lacks, and sizes that the transformer cannot take.

        Raises:
            ValueError: in one line.
        """
        if self.levels > 1:
            check_method(pipeline, self.between)
        if options.height < options.motion[1] or options.width < options.motion[2]:
            raise ValueError(
                f"refinement: expected a video no smaller than the first stage, {options.motion[1]}x{options.motion[2]}"
                f", got {options.height}x{options.width}"
            )
        codec, model = pipeline.codec, pipeline.refinement_transformer
        native, size = codec.latent_size(*options.motion), codec.latent_size(*options.size)
        for level in self.sizes(native, size):
            for grid, _ in self.passes(native, level):
                check_tokens(pipeline, model, grid)


def grid_of(latents: Tensor) -> Size3d:
    """Frames, height and width of latents B x C x t x h x w."""
    t, h, w = latents.shape[2:]
    return t, h, w


@dataclass(frozen=True)
class CineScaleRefinement(ProgressiveRefinement):
    """CineScale for diffusion transformers (arXiv 2508.15774), which grew out of FreeScale (arXiv 2412.09626).

    A level's latents are the ones before, upsampled, noised to the level after the skipped steps and denoised at the
    larger size (self-cascade upscaling). With s the growth of an axis against the first stage, and N that stage's
    tokens of a frame:

    - NTK-RoPE: the base of the rotary frequencies of that axis is multiplied by s ** (d / (d - 2)), where d is the
      number of a head's channels that turn with it. The slowest frequency turns s times slower, the fastest as before.
    - Attention temperature: logits are multiplied by log(s N) / log(N), where s is the mean growth of both axes, so
      that attention over more tokens is no flatter.

    Its authors' code for Wan2.1 upsamples latents trilinearly and restarts at step 15 of 50 of a schedule of shift 9:
    give `upsampling: latent`, `skip_steps` and `shift`. It multiplies the base by a fixed 25 at 1632x2880, and trains a
    LoRA at 1088x1920, which `refiner` may bring. That code has neither FreeScale's restrained dilated convolution nor
    its fusion of local and global attention, which belong to U-Nets; they are left out here, too. The frequencies along
    time stay as they are.

    Attributes:
        ntk: factor of the base along rows and columns; None follows the growth.
        temperature: factor of the logits; None follows the growth.
    """

    ntk: float | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, factor in (("ntk", self.ntk), ("temperature", self.temperature)):
            if factor is not None and not 0 < factor < math.inf:
                raise ValueError(f"{name}: expected a number > 0, got {factor}")

    def level(self, given: RefinementRun, native: Size3d) -> Tensor:
        """See ProgressiveRefinement."""
        denoiser, size = denoiser_of(given.pipeline.refinement_transformer), grid_of(given.latents)
        scales = [now / before for now, before in zip(size[1:], native[1:], strict=True)]
        bases = [
            ntk_factor(scale, channels) if self.ntk is None else self.ntk
            for scale, channels in zip(scales, denoiser.rotary_channels[1:], strict=True)
        ]
        _, rows, columns = denoiser.token_grid(native)
        temperature = self.temperature
        if temperature is None:
            temperature = attention_temperature(math.sqrt(math.prod(scales)), rows * columns)
        x, _ = given.renoised()
        with denoiser.scaled_rotary(bases[0], bases[1], temperature):
            return given.denoised(x, given.skip)

    def check(self, pipeline: LuVePipeline, options: CascadeOptions) -> None:
        """Refuse a family whose rotary embedding cannot be scaled; see ProgressiveRefinement."""
        super().check(pipeline, options)
        _ = denoiser_of(pipeline.refinement_transformer).rotary_channels


def ntk_factor(scale: float, channels: int) -> float:
    """Factor of a rotary base at which the slowest of channels / 2 frequencies is `scale` times slower.

    The slowest frequency is base ** (2 / channels - 1). With two channels there is one, 1 whatever the base.
    """
    return scale ** (channels / (channels - 2)) if channels > 2 else 1.0


def attention_temperature(scale: float, tokens: int) -> float:
    """Factor of the logits where a frame of `tokens` tokens has grown `scale` times along its sides."""
    return math.log(scale * tokens) / math.log(tokens) if tokens > 1 else 1.0


METHODS = {"cinescale": CineScaleRefinement}
