"""DemoFusion, against a plain loop over steps, crops and dilated samples."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import correlate1d
from torch import Tensor

from luve_lightning.cascade import CascadeOptions, LuVePipeline, SpeedOptions
from luve_lightning.cascade.refinement.demofusion import (
    DemoFusionRefinement,
    crop_starts,
    dilated,
    dilation_of,
    filtered,
)
from luve_lightning.cascade.run import ExpertUse
from luve_lightning.cascade.stages import refine
from luve_lightning.models.backbones import denoiser_of
from tests.helpers.noise import noise
from tests.helpers.tiny_luve import plain_pipeline

STEPS, SKIP = 3, 1


@pytest.fixture(scope="module")
def pipeline(tiny_cascade: Path) -> LuVePipeline:
    return plain_pipeline(tiny_cascade)


def blurred(x: Tensor, deviation: float, d: int = 2, axes: tuple[int, ...] = (3, 4)) -> Tensor:
    """A filter of 2 d - 1 rows and columns, of repeated borders, and the moments of before."""
    weights = np.exp(-(np.arange(1 - d, d) ** 2) / (2 * deviation**2))
    values = x.numpy().astype(float)
    for axis in axes:
        values = correlate1d(values, weights / weights.sum(), axis=axis, mode="nearest")
    for sample, before in zip(values, x.numpy().astype(float), strict=True):
        sample[:] = (sample - sample.mean()) / sample.std() * before.std() + before.mean()
    return torch.tensor(values, dtype=x.dtype)


@torch.no_grad()
def test_every_step_mixes_crops_and_dilated_samples(pipeline: LuVePipeline) -> None:
    """Twice the size: 3 x 3 crops too small to jitter, and 2 x 2 dilated samples."""
    z, motion = noise(2, 16, 2, 8, 8), noise(2, 16, 2, 4, 4)
    prompts, record = ["a red boat", "squares"], list[ExpertUse]()
    got = refine(
        pipeline, z, prompts, steps=STEPS, skip_steps=SKIP, guidance=1.0, refinement="demofusion", motion=motion,
        generator=torch.Generator().manual_seed(0), record=record,
    )  # fmt: skip
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    embeds, denoiser = pipeline.encode_prompt(prompts), denoiser_of(pipeline.transformer)
    shift = pipeline.schedule().shift
    sigmas = [shift * (1 - i / STEPS) / (1 + (shift - 1) * (1 - i / STEPS)) for i in range(STEPS + 1)]

    def velocity(x: Tensor, sigma: float) -> Tensor:
        t = torch.tensor([1000 * sigma] * len(x)).bfloat16().float()
        return denoiser.velocity(x, t, embeds)

    x = (1 - sigmas[SKIP]) * z + sigmas[SKIP] * eps
    for sigma, after in zip(sigmas[SKIP:-1], sigmas[SKIP + 1 :], strict=True):
        c = 0.5 * (1 + math.cos(math.pi * (1 - sigma)))
        x = (1 - c**3) * x + c**3 * ((1 - sigma) * z + sigma * eps)
        total, count = torch.zeros_like(x), torch.zeros(8, 8)
        for row in (0, 2, 4):
            for column in (0, 2, 4):
                total[..., row : row + 4, column : column + 4] += velocity(
                    x[..., row : row + 4, column : column + 4], sigma
                )
                count[row : row + 4, column : column + 4] += 1
        smooth, whole = blurred(x, 0.8 * (0.99 * c + 0.01)), torch.zeros_like(x)
        for row in (0, 1):
            for column in (0, 1):
                whole[..., row::2, column::2] = velocity(smooth[..., row::2, column::2], sigma)
        x = x + (after - sigma) * ((1 - c) * total / count + c * whole)
    torch.testing.assert_close(got, x, rtol=2e-4, atol=2e-4)
    assert [round(use.sigma, 5) for use in record] == [round(sigma, 5) for sigma in sigmas[SKIP:-1]]


def test_crops_jitter_and_still_cover(pipeline: LuVePipeline) -> None:
    method, native, size = DemoFusionRefinement(), (2, 16, 20), (2, 40, 36)
    generator = torch.Generator().manual_seed(0)
    draws = [list(method._corners(native, size, generator)) for _ in range(6)]
    still = list(method._corners(native, size, None))
    assert len({tuple(draw) for draw in draws}) == 6
    for draw in draws:
        covered = np.zeros(size[1:], int)
        for (row, column), (r, c) in zip(draw, still, strict=True):
            assert abs(row - r) <= 2
            assert abs(column - c) <= 2
            covered[row : row + 16, column : column + 20] += 1
        assert covered.min() > 0
        assert covered.shape == size[1:]
    with torch.no_grad():
        first, second = (
            refine(
                pipeline, noise(1, 16, 1, 12, 20), "x", steps=2, skip_steps=1, guidance=1.0, refinement="demofusion",
                motion=noise(1, 16, 1, 8, 8), generator=torch.Generator().manual_seed(0),
            ) for _ in range(2)
        )  # fmt: skip
    assert torch.equal(first, second), "the run's generator decides the places"


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 70), window=st.integers(1, 40), overlap=st.sampled_from([0.0, 0.3, 0.5, 0.75]))
def test_starts_cover_an_axis(length: int, window: int, overlap: float) -> None:
    window = min(window, length)
    starts = crop_starts(length, window, overlap)
    assert starts[0] == 0
    assert starts[-1] == length - window
    assert all(0 < b - a <= max(1, round(window * (1 - overlap))) for a, b in itertools.pairwise(starts))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), d=st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_dilated_samples_are_put_back_in_place(rows: int, columns: int, d: tuple[int, int]) -> None:
    x, seen = noise(2, 3, 2, rows, columns), []

    def velocity(sample: Tensor) -> Tensor:
        seen.append(sample.shape[-2:])
        return 2 * sample

    assert torch.equal(dilated(velocity, x, d), 2 * x)
    assert len(seen) == d[0] * d[1]
    assert all(n % 2 == 0 for shape in seen for n in shape)


def test_the_filter_keeps_moments_and_leaves_an_axis_that_has_not_grown() -> None:
    x = noise(3, 4, 2, 6, 10) * 2 + 1
    assert torch.equal(filtered(x, (1, 1), 0.8), x)
    got = filtered(x, (2, 2), 0.8)
    torch.testing.assert_close(got, blurred(x, 0.8), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1:2], filtered(x[1:2], (2, 2), 0.8), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(filtered(x, (1, 3), 0.8), blurred(x, 0.8, 3, (4,)), rtol=1e-4, atol=1e-4)


def test_growth_is_rounded_and_planned() -> None:
    assert dilation_of((5, 12, 12), (5, 18, 24)) == (2, 2)
    assert dilation_of((5, 12, 12), (5, 12, 36)) == (1, 3)
    method = DemoFusionRefinement()
    assert method.passes((5, 12, 12), (5, 24, 24)) == [((5, 12, 12), 9), ((5, 12, 12), 4)]
    assert method.passes((5, 12, 12), (5, 18, 18)) == [((5, 12, 12), 4), ((5, 10, 10), 4)]
    [crops, samples] = method.planned((5, 12, 12), (5, 24, 24), 50, 10)
    assert (crops.steps, crops.skip, crops.passes, crops.further) == (50, 10, 9, False)
    assert (samples.passes, samples.further) == (4, True)


def test_bad_input_is_one_line(pipeline: LuVePipeline, tiny_cascade: Path) -> None:
    for options, message in (
        ({"overlap": 1.0}, r"overlap: expected a number in \[0, 1\), got 1.0"),
        ({"cosine_2": 0}, "cosine_2: expected a number > 0, got 0"),
        ({"sigma_filter": -1.0}, "sigma_filter: expected a number > 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=f"^refinement_options: {message}$"):
            CascadeOptions(64, 96, refinement="demofusion", refinement_options=options)
    cached = LuVePipeline.from_pretrained(tiny_cascade / "wan", experts={})
    cached.apply(SpeedOptions(cache="taylorseer"))
    run: dict[str, Any] = {"prompt": "x", "refinement": "demofusion", "motion": noise(1, 16, 1, 4, 4)}
    with pytest.raises(ValueError, match=r"^demofusion: a cache between steps would mix its crops"):
        refine(cached, noise(1, 16, 1, 8, 8), **run)
