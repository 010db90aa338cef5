"""Frequency filters over the token grid, against the transform and against waves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning.functional.frequency import FrequencyFilter, filter_tokens

grids = st.tuples(st.integers(1, 5), st.integers(1, 13), st.integers(1, 13))
filters = st.builds(
    FrequencyFilter,
    band=st.sampled_from(["low", "high"]),
    cutoff=st.floats(0, 1) | st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0]),
    axes=st.lists(st.sampled_from("thw"), min_size=1, max_size=3, unique=True).map(tuple),
    window=st.sampled_from(["ideal", "gaussian", "butterworth"]),
    order=st.integers(1, 5),
)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def gain(frequency: float, settings: FrequencyFilter) -> float:
    """Low-pass gain at a frequency in units of Nyquist, written out anew."""
    if settings.window == "ideal" or settings.cutoff == 0:
        return float(frequency <= settings.cutoff + 1e-12)
    ratio = min(frequency / settings.cutoff, 1e9)  # a gain of 0
    if settings.window == "gaussian":
        return float(2 ** (-(ratio**2) / 2))
    return float(1 / math.sqrt(1 + ratio ** (2 * settings.order)))


def filtered_by_numpy(tokens: torch.Tensor, grid: tuple[int, ...], settings: FrequencyFilter) -> np.ndarray:
    spectrum = np.fft.fftn(tokens.double().numpy().reshape(len(tokens), *grid, -1), axes=(1, 2, 3))
    response = np.ones(grid)
    for axis, letter in enumerate("thw"):
        if letter in settings.axes:
            gains = [gain(abs(f) * 2, settings) for f in np.fft.fftfreq(grid[axis])]
            response *= np.reshape(gains, [-1 if d == axis else 1 for d in range(3)])
    if settings.band == "high":
        response = 1 - response
    return np.fft.ifftn(spectrum * response[None, ..., None], axes=(1, 2, 3)).real.reshape(tokens.shape)


@settings(max_examples=150, deadline=None)
@given(grid=grids, chosen=filters)
def test_it_equals_the_definition(grid: tuple[int, int, int], chosen: FrequencyFilter) -> None:
    tokens = noise(2, math.prod(grid), 3)
    want = filtered_by_numpy(tokens, grid, chosen)
    np.testing.assert_allclose(filter_tokens(tokens, grid, chosen).numpy(), want, atol=3e-6)


@settings(max_examples=60, deadline=None)
@given(grid=grids, chosen=filters)
def test_low_and_high_are_the_input(grid: tuple[int, int, int], chosen: FrequencyFilter) -> None:
    tokens = noise(1, math.prod(grid), 2)
    arguments = (chosen.cutoff, chosen.axes, chosen.window, chosen.order)
    low, high = (FrequencyFilter(band, *arguments) for band in ("low", "high"))
    total = filter_tokens(tokens, grid, low) + filter_tokens(tokens, grid, high)
    torch.testing.assert_close(total, tokens, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("cycles", "passes"), [(0, True), (3, True), (4, False), (6, False)])
def test_the_cutoff_is_a_fraction_of_nyquist(cycles: int, passes: bool) -> None:
    """12 tokens: Nyquist is 6 cycles, half of it 3; the cutoff itself passes."""
    wave = torch.cos(2 * math.pi * cycles * torch.arange(12).double() / 12).repeat(5, 1).reshape(1, 60, 1)
    low = filter_tokens(wave, (1, 5, 12), FrequencyFilter("low", 0.5))
    torch.testing.assert_close(low, wave if passes else torch.zeros_like(wave), atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", ["gaussian", "butterworth"])
def test_smooth_windows_halve_the_power_at_the_cutoff(window: Any) -> None:
    response = FrequencyFilter("low", 0.5, window=window, order=3).response(16)
    assert response[0] == 1
    assert response[4] == pytest.approx(math.sqrt(0.5), abs=1e-12)
    assert (response[1:9].diff() < 0).all()


@pytest.mark.parametrize("band", ["low", "high"])
def test_bfloat16_is_rounded_once(band: Any) -> None:
    """Large common values, small differences: filtered in bfloat16 the high-pass would be noise."""
    grid, chosen = (2, 7, 9), FrequencyFilter(band, 0.3)
    tokens = (noise(1, 126, 4) + 100).bfloat16()
    want = filter_tokens(tokens.double(), grid, chosen).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = filter_tokens(tokens, grid, chosen)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, atol=5e-5, rtol=2**-7)


def test_gradients_are_the_filter_itself() -> None:
    """The matrices are symmetric: the gradient of a filter is the filtered gradient."""
    grid, chosen = (3, 4, 5), FrequencyFilter("high", 0.4, ("t", "w"), "gaussian")
    tokens = noise(2, 60, 3, dtype=torch.float64).requires_grad_()
    upstream = noise(2, 60, 3, dtype=torch.float64)
    filter_tokens(tokens, grid, chosen).backward(upstream)
    assert tokens.grad is not None
    torch.testing.assert_close(tokens.grad, filter_tokens(upstream, grid, chosen))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"band": "mid", "cutoff": 0.5}, "filter band 'mid'"),
        ({"band": "low", "cutoff": 1.5}, "filter cutoff 1.5: expected a fraction of Nyquist"),
        ({"band": "low", "cutoff": math.nan}, "filter cutoff nan"),
        ({"band": "low", "cutoff": 0.5, "axes": ("h", "h")}, "filter axes"),
        ({"band": "low", "cutoff": 0.5, "axes": ()}, "filter axes"),
        ({"band": "low", "cutoff": 0.5, "window": "hann"}, "filter window 'hann'"),
        ({"band": "low", "cutoff": 0.5, "order": 0}, "filter order 0"),
    ],
)
def test_says_what_is_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrequencyFilter(**arguments)


def test_refuses_tokens_of_another_grid() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 12, 2\) are not B x \(T\*h\*w\) x C of grid \(1, 3, 5\)"):
        filter_tokens(noise(1, 12, 2), (1, 3, 5), FrequencyFilter("low", 0.5))
