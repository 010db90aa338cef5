"""When bands resolve: recorded from real pipelines, and computed on latents whose answer is known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from torch import Tensor

from luve_lightning.evaluation.denoising_spectra import (
    COLUMNS,
    BandResolution,
    CleanPrediction,
    NoSpectrum,
    denoising_spectra,
    joined,
    recorded_predictions,
    suggest_switch,
)
from tests.helpers.sampling_sigmas import sampling_sigmas
from tests.helpers.tiny_spectra import tiny_pipeline

EDGES = (0, 0.5, 1)


def generate(pipeline: WanPipeline, **changes: Any) -> Tensor:
    options: dict[str, Any] = {
        "prompt": "left", "height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 5,
        "guidance_scale": 3.0, "max_sequence_length": 16, "output_type": "latent",
    }  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    latents: Tensor = pipeline(generator=generator, **(options | changes)).frames
    return latents


def test_unipcs_predictions_are_recorded(tiny_backbone: Path) -> None:
    """This scheduler keeps what it makes of the model's output: an independent source for the same numbers."""
    pipeline = tiny_pipeline(tiny_backbone)
    kept = []

    def at_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kept.append((pipe.scheduler.model_outputs[-1].clone(), int(timestep)))
        return tensors

    with recorded_predictions(pipeline.scheduler) as found:
        latents = generate(pipeline, callback_on_step_end=at_step_end)
    assert isinstance(pipeline.scheduler, UniPCMultistepScheduler)
    assert [p.timestep for p in found] == [timestep for _, timestep in kept]
    assert [p.sigma for p in found] == sampling_sigmas(5, 5.0)[:-1].tolist()
    for prediction, (clean, _) in zip(found, kept, strict=True):
        torch.testing.assert_close(prediction.latents, clean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[-1].latents, latents, rtol=1e-4, atol=1e-5)
    assert torch.equal(generate(pipeline), latents), "recording changed what is generated, or was left on"
    assert len(found) == 5


def test_eulers_predictions_follow_from_its_steps(tiny_backbone: Path) -> None:
    pipeline = tiny_pipeline(tiny_backbone)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    start = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    steps = [start]

    def at_step_end(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(tensors["latents"].clone())
        return tensors

    with recorded_predictions(pipeline.scheduler) as found:
        generate(pipeline, latents=start, callback_on_step_end=at_step_end)
    sigmas = sampling_sigmas(5, 3.0, scheduler="euler")
    for k, prediction in enumerate(found):
        velocity = (steps[k + 1] - steps[k]) / (sigmas[k + 1] - sigmas[k])
        assert prediction.sigma == pytest.approx(sigmas[k].item())
        torch.testing.assert_close(prediction.latents, steps[k] - sigmas[k] * velocity, rtol=1e-3, atol=1e-4)


def test_a_scheduler_is_left_as_it_was() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(KeyError), recorded_predictions(scheduler):
        raise KeyError("a bug")
    assert "step" not in vars(scheduler)
    with (
        pytest.raises(ValueError, match=r"^DDIMScheduler is for epsilon, expected a flow-matching"),
        recorded_predictions(DDIMScheduler()),
    ):
        pass


def grating(cycles: int, phase: float = 0.0) -> Tensor:
    """1 x 2 x 3 x 16 x 20, equal in all channels and frames."""
    x = torch.arange(20, dtype=torch.float64) / 20
    return torch.cos(2 * math.pi * (cycles * x + phase)).expand(1, 2, 3, 16, 20)


def predictions(*latents: Tensor) -> list[CleanPrediction]:
    levels = torch.linspace(1, 0.1, len(latents)).tolist()
    return [CleanPrediction(sigma, 1000 * sigma, x) for sigma, x in zip(levels, latents, strict=True)]


def test_a_band_resolves_when_its_structure_is_in_place() -> None:
    low, high = grating(2), 0.5 * grating(8)
    found = denoising_spectra(
        predictions(
            3 * low,  # right place, too strong; nothing of the high band
            grating(2, 0.25) + high,  # a quarter of a period beside: no agreement
            low + grating(2, 0.25) - high,  # half of the power agrees; the opposite sign
            low + high,
        ),
        EDGES,
    )
    assert found.resolved.flatten().tolist() == pytest.approx([1, 0, 0, 1, 0.5, 0, 1, 1], abs=1e-9)
    assert found.power.flatten().tolist() == pytest.approx([9, 0, 1, 1, 2, 1, 1, 1], abs=1e-9)
    assert found.bands == ["0-0.5", "0.5-1"]
    assert found.videos == 1
    rows = found.rows()
    assert all(tuple(row) == COLUMNS for row in rows)
    assert [(row["step"], row["band"]) for row in rows[:3]] == [(0, "0-0.5"), (0, "0.5-1"), (1, "0-0.5")]
    assert rows[-1]["sigma"] == pytest.approx(0.1)
    assert rows[-1]["timestep"] == pytest.approx(100)


def test_ideal_predictions_of_gaussian_latents_resolve_by_signal_and_noise() -> None:
    """S / (S + N) for a posterior mean: what the default share is chosen by."""
    generator = torch.Generator().manual_seed(0)
    clean = 1.5 * torch.randn(1, 8, 8, 40, 40, generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    latents, expected = [], []
    for sigma in (0.9, 0.6, 0.3):
        signal, power = ((1 - sigma) * 1.5) ** 2, sigma**2
        seen = (1 - sigma) * clean + sigma * noise
        latents.append(seen * signal / (signal + power) / (1 - sigma))
        expected.append(signal / (signal + power))
    found = denoising_spectra(predictions(*latents, clean), EDGES).resolved[:3]
    torch.testing.assert_close(found, torch.tensor(expected).double()[:, None].expand(3, 2), rtol=0.02, atol=0.01)


def test_videos_count_alike_and_can_be_joined() -> None:
    weak, strong = 0.1 * (grating(2) + grating(8)), 10 * (grating(2) + grating(8))
    other = grating(2, 0.25) + grating(8)
    batch = denoising_spectra(predictions(torch.cat([weak, other]), torch.cat([weak, strong])), EDGES)
    apart = [denoising_spectra(predictions(*pair), EDGES) for pair in ((weak, weak), (other, strong))]
    for found in (batch, joined(apart)):
        assert found.videos == 2
        assert found.resolved[0].tolist() == pytest.approx([0.5, 1])
        assert found.resolved_each[:, 0, 0].tolist() == pytest.approx([1, 0], abs=1e-9)
    with pytest.raises(ValueError, match="same noise levels and bands"):
        joined([apart[0], denoising_spectra(predictions(weak, weak), (0, 1))])


def test_bad_input_is_one_line() -> None:
    good = grating(2) + grating(8)
    with pytest.raises(ValueError, match="no denoising step was recorded"):
        denoising_spectra([], EDGES)
    with pytest.raises(NoSpectrum, match="not finite: the model has diverged"):
        denoising_spectra(predictions(good * math.nan, good), EDGES)
    with pytest.raises(NoSpectrum, match="no power in one of the bands"):
        denoising_spectra(predictions(good, torch.ones_like(good)), EDGES)
    with pytest.raises(ValueError, match=r"no frequency of these frames lies between 0 and 0.01"):
        denoising_spectra(predictions(good, good), (0, 0.01, 1))


def curves(*videos: list[list[float]]) -> BandResolution:
    """Spectra with these shares at sigma 1, 0.8, 0.6, ...; a list of steps a video, a list of bands a step."""
    resolved = torch.tensor(videos, dtype=torch.float64)
    sigmas = tuple(1 - 0.2 * k for k in range(resolved.shape[1]))
    edges = tuple(k / resolved.shape[2] for k in range(resolved.shape[2] + 1))
    return BandResolution(edges, sigmas, sigmas, resolved, resolved)


def test_the_switch_is_where_the_low_band_crosses() -> None:
    spectra = curves([[0.0, 0.0], [0.4, 0.1], [0.8, 0.3], [1.0, 1.0]])
    found = suggest_switch(spectra)
    assert found.sigma == pytest.approx(0.75)
    assert (found.low, found.high, found.separated) == (pytest.approx(0.5), pytest.approx(0.15), True)
    assert math.isnan(found.sigma_low)
    assert suggest_switch(spectra, 0.9).sigma == pytest.approx(0.5)


def test_what_the_caption_settles_does_not_count() -> None:
    found = suggest_switch(curves([[0.6, 0.0], [0.7, 0.1], [0.9, 0.3], [1.0, 1.0]]))
    assert (found.sigma, found.low) == (pytest.approx(0.75 - 0.05), pytest.approx(0.8))
    assert suggest_switch(curves([[1.0, 0.0], [1.0, 1.0]])).sigma == 1
    # The high band begins at 0.2, so 0.6 is half of its way.
    for high, separated in ((0.59, True), (0.61, False)):
        spectra = curves([[0.0, 0.2], [0.5, high], [1.0, 1.0]])
        assert suggest_switch(spectra).separated is separated


def test_a_band_that_falls_back_has_not_settled() -> None:
    spectra = curves([[0.0, 0.0], [0.6, 0.5], [0.4, 0.6], [0.6, 0.7], [1.0, 1.0]])
    found = suggest_switch(spectra)
    assert found.sigma == pytest.approx(0.5)
    assert not found.separated
    assert spectra.at(0.9).tolist() == pytest.approx([0.3, 0.25])


def test_the_interval_is_that_of_the_videos() -> None:
    early, late = [[0.2, 0.0], [1.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [0.1, 0.0], [1.0, 1.0]]
    found = suggest_switch(curves(early, late), seed=1)
    alone = [suggest_switch(curves(video)).sigma for video in (early, late)]
    assert (found.sigma_high, found.sigma_low) == (pytest.approx(alone[0]), pytest.approx(alone[1]))
    assert found.sigma_low < found.sigma < found.sigma_high
    same = suggest_switch(curves(early, early, early))
    assert same.sigma_low == same.sigma_high == pytest.approx(same.sigma)


def test_a_switch_of_bad_input_is_refused_in_one_line() -> None:
    for share in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="share: expected a number between 0 and 1"):
            suggest_switch(curves([[0.0, 0.0], [1.0, 1.0]]), share)
    with pytest.raises(ValueError, match="at least two bands"):
        suggest_switch(curves([[0.0], [1.0]]))
