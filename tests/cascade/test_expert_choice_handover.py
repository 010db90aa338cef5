"""A handover by each video's own spectrum, against the formula written out."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from luve_lightning.cascade import CascadeOptions, ExpertUse, LuVePipeline
from luve_lightning.cascade.expert_choice import SpectrumChooser, expert_chooser
from luve_lightning.cascade.options import SpectrumSwitch
from luve_lightning.cascade.run import handed_over
from luve_lightning.cascade.stages import refine
from luve_lightning.evaluation.denoising_spectra import recorded_predictions
from tests.helpers.tiny_luve import EXPERTS, PROMPT, add_experts, noise, seeded, tiny_luve
from tests.helpers.tiny_wan import tiny_transformer

SHAPE = (1, 16, 2, 8, 12)
SIGMAS = [0.96, 0.94, 0.92, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.4]


@pytest.fixture(scope="module")
def pipeline(tiny_backbone: Path) -> LuVePipeline:
    return tiny_luve(tiny_backbone, EXPERTS)


def low_power(latents: np.ndarray, band: float) -> np.ndarray:
    """Mean square of what frequencies in (0, band] of Nyquist add to each video, by NumPy's transform."""
    height, width = latents.shape[-2:]
    y, x = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)
    radius = np.round(np.hypot(y, x) * max(height, width)) / max(height, width) * 2
    inside = (radius > 0) & (radius <= band + 1e-9)
    power = np.abs(np.fft.fft2(latents)) ** 2 / (height * width) ** 2
    return (power * inside).sum((-2, -1)).mean((1, 2))


def rates_of(predictions: list[tuple[float, Tensor]], band: float) -> list[float]:
    """How fast the low band changes at each step; the first has nothing to compare with."""
    rates = [math.inf]
    for (earlier, before), (sigma, after) in pairwise(predictions):
        logs = [math.log((1 - level) / level) for level in (earlier, sigma)]
        change = np.sqrt(low_power((after - before).numpy(), band) / low_power(after.numpy(), band))
        rates.append(float(change.max()) / (logs[1] - logs[0]))
    return rates


def settled_from(predictions: list[tuple[float, Tensor]], switch: SpectrumSwitch) -> int:
    """The first step that the later expert does: by the formula."""
    rates = rates_of(predictions, switch.band)
    for step, (sigma, _) in enumerate(predictions):
        last = rates[max(0, step - switch.patience) : step]
        calm = len(last) == switch.patience and max(last) <= switch.rate
        if sigma <= switch.low or (calm and sigma <= switch.high):
            return step
    return len(predictions)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 999), st.floats(0.05, 3), st.integers(1, 3), st.sampled_from([0.25, 0.5, 0.75]), st.integers(1, 2)
)
def test_it_hands_over_when_the_formula_says(seed: int, rate: float, patience: int, band: float, batch: int) -> None:
    """Predictions that come closer and closer to the last, each band at its own pace."""
    switch = SpectrumSwitch(rate, patience, band, low=0.65, high=0.93)
    goal, start = (noise(batch, *SHAPE[1:], seed=seed + i) for i in range(2))
    predictions = [(s, goal + start * s**4 + 0.1 * s * noise(*SHAPE[1:], seed=i)) for i, s in enumerate(SIGMAS)]
    assume(all(abs(found / rate - 1) > 1e-3 for found in rates_of(predictions, band)))  # float32 on either side
    chooser = SpectrumChooser(switch, "before", "after")
    for _ in range(2):  # a second run knows nothing of the first
        chooser.begin()
        chosen = []
        for sigma, clean in predictions:
            chosen.append(chooser(1000 * sigma))
            chooser.see(sigma, clean)
        step = settled_from(predictions, switch)
        assert chosen == ["before"] * step + ["after"] * (len(SIGMAS) - step)


def test_the_rate_is_that_of_any_number_of_steps() -> None:
    """One path in 40 and in 160 steps: the band settles at the same noise level."""
    goal, start = noise(*SHAPE, seed=1), noise(*SHAPE, seed=2)
    levels = []
    for steps in (40, 160):
        chooser = SpectrumChooser(SpectrumSwitch(rate=0.35, patience=1, low=0.01, high=0.99), "lfe", "hfe")
        for sigma in np.linspace(0.98, 0.02, steps).tolist():
            if chooser(1000 * sigma) == "hfe":
                levels.append(sigma)
                break
            chooser.see(sigma, goal + sigma / (1 - sigma) / 4 * start)
    assert levels[0] == pytest.approx(levels[1], abs=0.06)
    assert 0.1 < levels[1] < 0.9


def used(pipeline: LuVePipeline, switch: Any, **options: Any) -> tuple[Tensor, list[ExpertUse]]:
    record: list[ExpertUse] = []
    latents = refine(
        pipeline, noise(*SHAPE), PROMPT, steps=12, skip_steps=1, guidance=3.0, generator=seeded(), record=record,
        switch=switch, **options,
    )  # fmt: skip
    return latents, record


@pytest.mark.parametrize(
    "switch", [SpectrumSwitch(rate=1e6, high=0.99), SpectrumSwitch(rate=1.0, patience=1), SpectrumSwitch(rate=1e-6)]
)
def test_the_video_is_that_of_a_fixed_switch_at_that_level(pipeline: LuVePipeline, switch: SpectrumSwitch) -> None:
    with recorded_predictions(pipeline.scheduler) as seen:
        latents, record = used(pipeline, switch)
    sigma = handed_over(record)
    assert sigma is not None
    step = settled_from([(prediction.sigma, prediction.latents) for prediction in seen], switch)
    assert [use.expert for use in record] == ["lfe"] * step + ["hfe"] * (len(record) - step)
    assert record[step].sigma == sigma
    fixed, same = used(pipeline, record[step - 1].timestep / 1000)
    assert same == record
    assert torch.equal(latents, fixed)
    if switch.rate == 1e6:
        assert step == 3, "two predictions to compare, and patience"


def test_left_out_experts_leave_steps_without_one(pipeline: LuVePipeline) -> None:
    switch = SpectrumSwitch(rate=1e6, high=0.99)
    assert [use.expert for use in used(pipeline, switch, experts="lfe")[1]] == ["lfe"] * 3 + [None] * 8
    assert [use.expert for use in used(pipeline, switch, experts="hfe")[1]] == [None] * 3 + ["hfe"] * 8


def test_where_it_is_meaningless_it_is_refused(pipeline: LuVePipeline) -> None:
    with pytest.raises(ValueError, match=r"^switch spectrum: there are no experts between which to hand over$"):
        expert_chooser(tiny_transformer(), switch=SpectrumSwitch())
    with pytest.raises(ValueError, match=r"^switch spectrum: there are no experts"):
        used(pipeline, SpectrumSwitch(), experts="none")
    cached = tiny_transformer()
    add_experts(cached, EXPERTS)
    cached.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"^switch spectrum: a cache repeats predictions from step to step, which"):
        expert_chooser(cached, switch=SpectrumSwitch())
    with pytest.raises(ValueError, match=r"^no frequency of these frames lies between 0 and 0.25 of Nyquist"):
        refine(pipeline, noise(1, 16, 1, 2, 2), PROMPT, steps=4, guidance=1.0, skip_steps=1, switch=SpectrumSwitch())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 0.0}, "switch_options.rate: expected a number > 0, got 0.0"),
        ({"patience": 0}, "switch_options.patience: expected at least 1 step, got 0"),
        ({"band": 1.5}, r"switch_options.band: expected a fraction of Nyquist in \(0, 1\], got 1.5"),
        ({"low": 0.9, "high": 0.8}, "switch_options: low 0.9 and high 0.8: expected 0 < low <= high < 1, in sigma"),
    ],
)
def test_impossible_options_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        SpectrumSwitch(**changes)


def test_options_of_the_cascade() -> None:
    fixed, adaptive = CascadeOptions(32, 48, switch=0.8), CascadeOptions(32, 48, switch="spectrum")
    assert (fixed.handover, adaptive.handover) == (0.8, SpectrumSwitch())
    assert CascadeOptions(32, 48).handover is None
    assert "switch_options" not in fixed.recipe()
    assert adaptive.recipe() == fixed.recipe() | {
        "switch": "spectrum",
        "switch_options": {"rate": 0.7, "patience": 2, "band": 0.25, "low": 0.7, "high": 0.95},
    }
    with pytest.raises(ValueError, match=r"^switch: expected a sigma between 0 and 1 or spectrum, got 'spectra'$"):
        CascadeOptions(32, 48, switch="spectra")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^switch_options: they are for switch spectrum, got switch 0.8$"):
        CascadeOptions(32, 48, switch=0.8, switch_options=SpectrumSwitch(rate=1.0))


def test_one_expert_throughout_has_no_handover() -> None:
    steps = [ExpertUse("motion", 0, 999.0, 0.999, None), ExpertUse("refined", 3, 800.0, 0.8, "hfe")]
    assert handed_over(steps) is None
    assert handed_over([]) is None
    assert handed_over([*steps, ExpertUse("refined", 4, 700.0, 0.7, None)]) == 0.7
