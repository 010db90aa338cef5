"""CineScale: the unchanged transformer at a size it was not trained for, its positions and attention rescaled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from luve_lightning.cascade.refinement.progressive import ProgressiveRefinement, grid_of
from luve_lightning.cascade.run import RefinementRun
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.models.backbones import denoiser_of

if TYPE_CHECKING:
    from luve_lightning.cascade.options import CascadeOptions
    from luve_lightning.cascade.pipeline import LuVePipeline


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
