"""CineScale, and the levels of what grows in levels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luve_lightning.cascade import CascadeOptions, LuVePipeline
from luve_lightning.cascade.refinement.progressive import CineScaleRefinement, attention_temperature, ntk_factor
from luve_lightning.cascade.run import ExpertUse
from luve_lightning.cascade.stages import refine
from luve_lightning.functional.interpolation import interpolate_latents
from luve_lightning.models.backbones import denoiser_of
from tests.helpers.noise import noise
from tests.helpers.tiny_luve import plain_pipeline

RUN: dict[str, Any] = {"steps": 4, "skip_steps": 2, "guidance": 1.0}


@pytest.fixture(scope="module")
def pipeline(tiny_cascade: Path) -> LuVePipeline:
    return plain_pipeline(tiny_cascade)


def refined(pipeline: LuVePipeline, latents: Tensor, **more: Any) -> Tensor:
    prompts = ["a red boat", "squares", "x"][: len(latents)]
    return refine(pipeline, latents, prompts, generator=torch.Generator().manual_seed(1), **RUN | more)


def test_factors_follow_the_growth() -> None:
    for scale in (1.5, 2.0, 3.4):
        for d in (16, 42):
            base, slowest = 10_000.0, 2 / d - 1
            scaled = (base * ntk_factor(scale, d)) ** slowest
            assert scaled == pytest.approx(base**slowest / scale, rel=1e-9)
    assert ntk_factor(1.0, 42) == attention_temperature(1.0, 3600) == 1.0
    assert ntk_factor(2.0, 2) == 1.0
    # Of the authors' code for Wan at 2176x3840, twice the sides of 1088x1920: log_3600(2 * 3600).
    assert attention_temperature(2.0, 45 * 80) == pytest.approx(math.log(7200, 3600))


def test_it_is_luves_denoising_with_a_scaled_embedding(pipeline: LuVePipeline) -> None:
    latents, motion = noise(2, 16, 2, 8, 12), noise(2, 16, 2, 4, 8)
    got = refined(pipeline, latents, refinement="cinescale", motion=motion)
    plain = refined(pipeline, latents)
    channels = 4  # of a head of 12, along each axis
    tokens = 2 * 4  # of a frame of the first stage
    rows, columns = (s ** (channels / (channels - 2)) for s in (8 / 4, 12 / 8))
    temperature = math.log(math.sqrt(2 * 1.5) * tokens) / math.log(tokens)
    with denoiser_of(pipeline.transformer).scaled_rotary(rows, columns, temperature):
        want = refined(pipeline, latents)
    assert torch.equal(got, want)
    assert not torch.equal(got, plain)
    fixed = refined(pipeline, latents, refinement=CineScaleRefinement(ntk=1.0, temperature=1.0), motion=motion)
    assert torch.equal(fixed, plain)
    assert torch.equal(refined(pipeline, latents, refinement="cinescale", motion=noise(2, 16, 2, 8, 12)), plain)
    assert torch.equal(refined(pipeline, latents, refinement="cinescale", motion=motion, skip_steps=4), latents)


def test_levels_go_from_one_size_to_the_next(pipeline: LuVePipeline) -> None:
    """Each is denoised from the latents before, upsampled; the generator's noise goes on."""
    latents, motion, record = noise(1, 16, 2, 12, 16), noise(1, 16, 2, 4, 8), list[ExpertUse]()
    method = CineScaleRefinement(levels=2, ntk=1.0, temperature=1.0)
    got = refined(pipeline, latents, refinement=method, motion=motion, record=record)
    assert method.sizes((2, 4, 8), (2, 12, 16)) == [(2, 8, 12), (2, 12, 16)]
    generator = torch.Generator().manual_seed(1)
    middle = refine(pipeline, interpolate_latents(motion, (2, 8, 12)), "a red boat", generator=generator, **RUN)
    want = refine(pipeline, interpolate_latents(middle, (2, 12, 16)), "a red boat", generator=generator, **RUN)
    assert torch.equal(got, want)
    assert len(record) == method.steps(4, 2) == 4
    by_pixels = CineScaleRefinement(levels=2, between="rgb")
    assert refined(pipeline, latents, refinement=by_pixels, motion=motion).isfinite().all()


@pytest.mark.parametrize(
    ("native", "size", "levels", "sides"),
    [
        ((5, 12, 12), (5, 18, 18), 2, [(16, 16), (18, 18)]),
        ((5, 10, 12), (5, 30, 24), 3, [(16, 16), (24, 20), (30, 24)]),
        ((2, 90, 160), (3, 272, 480), 2, [(180, 320), (272, 480)]),
        ((1, 4, 6), (1, 4, 6), 2, [(4, 6), (4, 6)]),
    ],
)
def test_any_ratio_has_levels(native: Any, size: Any, levels: int, sides: list[tuple[int, int]]) -> None:
    assert CineScaleRefinement(levels).sizes(native, size) == [(size[0], *side) for side in sides]


def test_bad_input_is_one_line(pipeline: LuVePipeline) -> None:
    for options, message in (
        ({"levels": 0}, "refinement_options: levels: expected at least 1, got 0"),
        ({"between": "lanczos"}, "refinement_options: between: upsampling: expected one of .*, got 'lanczos'"),
        ({"ntk": 0.0}, "refinement_options: ntk: expected a number > 0, got 0.0"),
        ({"temperature": -1}, "refinement_options: temperature: expected a number > 0, got -1"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            CascadeOptions(64, 96, refinement="cinescale", refinement_options=options)
    latents = noise(1, 16, 2, 8, 12)
    with pytest.raises(ValueError, match="needs the first stage's latents: give motion="):
        refined(pipeline, latents, refinement="cinescale")
    with pytest.raises(ValueError, match="expected a video no smaller than the first stage, 80x96, got 64x96"):
        refined(pipeline, latents, refinement="cinescale", motion=noise(1, 16, 2, 10, 12))
    with pytest.raises(ValueError, match="the pipeline has no VLUer"):
        refined(pipeline, latents, refinement=CineScaleRefinement(2, "vluer"), motion=noise(1, 16, 2, 4, 6))
