"""Power spectra against the definition, on gratings and noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luve_lightning.functional import spectra
from luve_lightning.functional.spectra import band_density, band_power, luma_spectrum, radial_spectrum

SIDES = st.integers(1, 13)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def grating(height: int, width: int, cycles: tuple[float, float], amplitude: float = 1.0) -> Tensor:
    """1 x 1 x 1 x H x W with so many cycles from top to bottom and from left to right."""
    y = torch.arange(height, dtype=torch.float64)[:, None] / height
    x = torch.arange(width, dtype=torch.float64) / width
    return (amplitude * torch.cos(2 * math.pi * (cycles[0] * y + cycles[1] * x) + 0.3))[None, None, None]


def by_definition(frame: np.ndarray) -> tuple[list[float], list[float], float]:
    """Density and share of each ring, and the power of the corners: one coefficient at a time."""
    height, width = frame.shape
    longer = max(height, width)
    power = np.abs(np.fft.fft2(frame)) ** 2 / (height * width)
    rings: list[list[float]] = [[] for _ in range(longer // 2 + 1)]
    corners = 0.0
    for i, fy in enumerate(np.fft.fftfreq(height)):
        for j, fx in enumerate(np.fft.fftfreq(width)):
            radius = math.hypot(fy, fx)
            if radius > 0.5 + 1e-12:
                corners += power[i, j] / (height * width)
            else:
                ring = math.floor(radius * longer + 0.5)
                rings[min(ring, longer // 2)].append(power[i, j])
    shares = [len(ring) / (height * width) for ring in rings]
    return [sum(ring) / len(ring) for ring in rings], shares, corners


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.integers(0, 1000))
def test_the_definition_at_any_size(height: int, width: int, seed: int) -> None:
    frame = noise(1, 1, 1, height, width, seed=seed) + 3
    found = radial_spectrum(frame)
    density, area, corners = by_definition(frame[0, 0, 0].numpy())
    assert found.frequency.tolist() == [k / max(height, width) for k in range(max(height, width) // 2 + 1)]
    assert found.density[0, 0].tolist() == pytest.approx(density, rel=1e-9, abs=1e-12)
    assert found.area.tolist() == pytest.approx(area, rel=1e-12)
    assert found.corners.item() == pytest.approx(corners, rel=1e-9, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(SIDES, SIDES, st.integers(1, 4), st.sampled_from([torch.float64, torch.float32]))
def test_parseval(height: int, width: int, frames: int, dtype: torch.dtype) -> None:
    video = 2 + noise(2, 3, frames, height, width, seed=height * width, dtype=dtype)
    found = radial_spectrum(video)
    power = found.power.sum(-1) + found.corners
    assert power.dtype == torch.float64
    torch.testing.assert_close(power, video.double().square().mean((2, 3, 4)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (31, 31), (17, 40), (45, 24)])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.45])
def test_a_grating_has_its_power_at_its_frequency(height: int, width: int, share: float) -> None:
    longer = max(height, width)
    cycles = round(share * longer)
    turned = (0, cycles) if width == longer else (cycles, 0)
    found = radial_spectrum(1.5 + grating(height, width, turned, amplitude=0.8))
    power = found.power[0, 0]
    assert power[1:].argmax().item() + 1 == cycles
    assert found.frequency[cycles].item() == pytest.approx(cycles / longer)
    assert power[cycles].item() == pytest.approx(0.8**2 / 2, rel=1e-9)
    assert power[0].item() == pytest.approx(1.5**2, rel=1e-9)
    assert power.sum().item() == pytest.approx(0.8**2 / 2 + 1.5**2, rel=1e-9)


def test_a_diagonal_grating_lies_at_its_radius_or_in_the_corners() -> None:
    found = radial_spectrum(grating(40, 40, (6, 8)))
    assert found.power[0, 0, 10].item() == pytest.approx(0.5)
    assert radial_spectrum(grating(40, 40, (18, 18))).corners.item() == pytest.approx(0.5)


@pytest.mark.parametrize("window", [None, "hann"])
def test_white_noise_is_flat(window: Any) -> None:
    found = radial_spectrum(1.7 * noise(1, 1, 60, 50, 64, dtype=torch.float32), window).mean()
    assert found.density[2:].tolist() == pytest.approx([1.7**2] * 31, rel=0.12)
    assert found.density.mul(found.area).sum().item() / found.area.sum().item() == pytest.approx(1.7**2, rel=0.02)


def test_a_window_stops_the_borders_from_leaking() -> None:
    ramp = torch.linspace(0, 1, 64, dtype=torch.float64).expand(1, 1, 1, 64, 64)
    plain, tapered = (radial_spectrum(ramp, window).mean() for window in (None, "hann"))
    assert tapered.power[20:].sum() < plain.power[20:].sum() / 1000
    between = grating(64, 64, (0, 10.5))
    plain, tapered = (radial_spectrum(between, window).mean() for window in (None, "hann"))
    assert tapered.power[9:13].sum().item() == pytest.approx(0.5, rel=0.01)
    assert tapered.power[20:].sum() < plain.power[20:].sum() / 1000


def test_a_large_mean_does_not_drown_what_is_small() -> None:
    video = 100 + 0.01 * noise(1, 1, 2, 48, 64, dtype=torch.float32)
    narrow, wide = radial_spectrum(video), radial_spectrum(video.double())
    torch.testing.assert_close(narrow.density[..., 1:], wide.density[..., 1:], rtol=1e-4, atol=0)
    torch.testing.assert_close(narrow.density[..., 0], wide.density[..., 0], rtol=1e-9, atol=0)


def test_frames_are_averaged_and_channels_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    video = noise(2, 3, 5, 12, 9)
    whole = radial_spectrum(video)
    each = torch.stack([radial_spectrum(video[:, :, t : t + 1]).density for t in range(5)])
    torch.testing.assert_close(whole.density, each.mean(0))
    monkeypatch.setattr(spectra, "_VALUES_AT_ONCE", 2 * 2 * 3 * 12 * 9)  # two frames at a time
    torch.testing.assert_close(radial_spectrum(video).density, whole.density)
    mean = whole.mean()
    assert mean.density[3].item() == pytest.approx(whole.density[..., 3].mean().item())


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 20), st.integers(8, 20), st.integers(0, 99))
def test_bands_split_the_variance(height: int, width: int, seed: int) -> None:
    video = 5 + noise(1, 2, 2, height, width, seed=seed)
    bands = band_power(radial_spectrum(video), (0, 0.25, 0.6, 1))
    assert bands.shape == (1, 2, 3)
    variance = video.var((3, 4), correction=0).mean(2)
    torch.testing.assert_close(bands.sum(-1), variance)


def test_band_edges_belong_to_the_lower_band() -> None:
    for cycles, band in ((1, 0), (10, 0), (11, 1), (20, 1)):
        bands = band_power(radial_spectrum(grating(40, 40, (0, cycles))), (0, 0.5, 1))[0, 0]
        assert bands[band].item() == pytest.approx(0.5 if cycles < 20 else math.cos(0.3) ** 2)
        assert bands[1 - band].item() == pytest.approx(0, abs=1e-12)
    corner = radial_spectrum(grating(40, 40, (18, 18)))
    assert band_power(corner, (0.5, 1)).item() == pytest.approx(0.5)
    assert band_power(corner, (0.2, 0.9)).item() == pytest.approx(0, abs=1e-12)


def test_the_density_of_a_band_is_that_of_noise() -> None:
    density = band_density(radial_spectrum(2 * noise(1, 1, 40, 40, 30)), (0, 0.3, 1))
    assert density[0, 0].tolist() == pytest.approx([4, 4], rel=0.1)


def test_luma_is_bt709s() -> None:
    frames = torch.randint(0, 256, (3, 20, 24, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    luma = (frames.double() * torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)).sum(-1) / 255
    want = radial_spectrum(luma[None, None], "hann")
    torch.testing.assert_close(luma_spectrum(frames).density, want.density[0, 0], rtol=1e-4, atol=1e-10)
    flat = luma_spectrum(torch.full((2, 16, 16, 3), 128, dtype=torch.uint8))
    assert flat.density[1:].max() < 1e-12
    assert flat.power[0].item() == pytest.approx((128 / 255) ** 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: radial_spectrum(torch.zeros(3, 4, 4)), "floating point B x C x T x H x W, got torch.float32 3 x 4"),
        (lambda: radial_spectrum(torch.zeros(1, 1, 1, 4, 4).int()), "got torch.int32"),
        (lambda: radial_spectrum(torch.zeros(1, 1, 0, 4, 4)), "1 x 1 x 0 x 4 x 4"),
        (lambda: radial_spectrum(torch.zeros(1, 1, 1, 4, 4), "box"), "window: expected hann or none, got 'box'"),  # type: ignore[arg-type]
        (lambda: luma_spectrum(torch.zeros(1, 4, 4, 3)), "expected uint8 T x H x W x 3"),
        (lambda: band_power(radial_spectrum(torch.zeros(1, 1, 1, 4, 4)), (0, 0.25, 1)), "between 0 and 0.25 of Nyq"),
        (lambda: band_power(radial_spectrum(torch.zeros(1, 1, 1, 4, 4)), (0, 1, 0.5)), r"got \[0, 1, 0.5\]"),
        (lambda: band_power(radial_spectrum(torch.zeros(1, 1, 1, 4, 4)), (0.5,)), "at least two rising"),
        (lambda: band_power(radial_spectrum(torch.zeros(1, 1, 1, 4, 4)), (0, math.nan)), "rising fractions"),
        (lambda: band_power(radial_spectrum(torch.zeros(1, 1, 1, 4, 4)), (0, 1.5)), "rising fractions"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
