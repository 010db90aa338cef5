"""Flow matching against diffusers' schedulers and the numbers of the paper."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st

from luve_lightning.functional.noise_bands import (
    clean_of_velocity,
    index_fraction_of_sigma,
    noised,
    shift_sigma,
    sigma_of_index_fraction,
    sigma_of_timestep,
    timestep_of_sigma,
    unshift_sigma,
    velocity,
)
from tests.helpers.sampling_sigmas import sampling_sigmas

SHIFTS = st.floats(0.2, 20)


def wan_scheduler(name: str, shift: float, steps: int) -> Any:
    scheduler: Any
    if name == "unipc":
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
        )
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler


def test_the_papers_switch_in_every_unit() -> None:
    sigma = sigma_of_index_fraction(5 / 12, 5.0)
    assert sigma == pytest.approx(0.875, abs=1e-15)
    assert unshift_sigma(sigma, 5.0) == pytest.approx(7 / 12, abs=1e-15)
    assert timestep_of_sigma(sigma) == pytest.approx(875, abs=1e-12)
    assert sigma_of_timestep(875) == 0.875
    assert index_fraction_of_sigma(0.875, 5.0) == pytest.approx(0.417, abs=5e-4)
    # 0.417 as printed is a third of a timestep lower.
    assert timestep_of_sigma(sigma_of_index_fraction(0.417, 5.0)) == pytest.approx(874.85, abs=0.01)


@given(sigma=st.floats(0, 1), shift=SHIFTS)
def test_shifting_is_the_formula_and_can_be_undone(sigma: float, shift: float) -> None:
    shifted = shift_sigma(sigma, shift)
    assert 0 <= shifted <= 1
    assert shifted == pytest.approx(shift * sigma / (1 + (shift - 1) * sigma), rel=1e-12)
    assert unshift_sigma(shifted, shift) == pytest.approx(sigma, abs=1e-12)
    assert sigma_of_index_fraction(1 - sigma, shift) == pytest.approx(shifted, abs=1e-12)
    assert index_fraction_of_sigma(shifted, shift) == pytest.approx(1 - sigma, abs=1e-12)
    as_tensor = shift_sigma(torch.tensor([sigma], dtype=torch.float64), shift)
    assert as_tensor.item() == pytest.approx(shifted, rel=1e-12)


def test_the_ends_are_exact_for_any_shift() -> None:
    # 1.7 / (1 + 0.7) style rounding would leave [0, 1].
    for shift in np.linspace(0.1, 12, 500):
        assert shift_sigma(1.0, float(shift)) == unshift_sigma(1.0, float(shift)) == 1
        assert shift_sigma(0.0, float(shift)) == unshift_sigma(0.0, float(shift)) == 0


@given(name=st.sampled_from(["unipc", "euler"]), steps=st.integers(1, 80), shift=SHIFTS, data=st.data())
def test_sampling_sigmas_are_the_schedulers(name: Any, steps: int, shift: float, data: Any) -> None:
    skip = data.draw(st.integers(0, steps - 1))
    scheduler = wan_scheduler(name, shift, steps)
    sigmas = sampling_sigmas(steps, shift, skip, scheduler=name)
    assert sigmas.dtype == torch.float32
    # diffusers rounds Euler's last sigma to float32 before it spaces and shifts again.
    torch.testing.assert_close(sigmas, scheduler.sigmas[skip:], rtol=0, atol=0 if name == "unipc" else 1e-6)
    timesteps = scheduler.timesteps[skip:]
    rounding = 1 if name == "unipc" else 1e-3
    assert ((timestep_of_sigma(sigmas[:-1]) - timesteps).abs() <= rounding).all()
    if name == "euler":
        torch.testing.assert_close(sigma_of_timestep(timesteps), sigmas[:-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["unipc", "euler"])
def test_the_papers_11_low_and_29_high_frequency_steps(name: Any) -> None:
    timesteps = wan_scheduler(name, 5.0, 50).timesteps[10:]
    assert ((timesteps >= 875).sum(), (timesteps < 875).sum()) == (11, 29)
    sigmas = sampling_sigmas(50, 5.0, 10, scheduler=name)[:-1]
    # UniPC rounds timesteps down, which moves none across a whole number.
    assert torch.equal(sigmas >= 0.875, timesteps >= 875)


def test_steps_of_the_two_schedulers_differ_where_documented() -> None:
    unipc, euler = (sampling_sigmas(50, 5.0, scheduler=name) for name in ("unipc", "euler"))
    assert unipc[0] == pytest.approx(1 - 1e-6, abs=1e-7)
    assert euler[0] == 1
    assert unipc[-2] == pytest.approx(0.097, abs=5e-4)
    assert euler[-2] == pytest.approx(0.024, abs=5e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_noising_is_diffusers_and_the_velocity_leads_back(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 3, 2, 5, 6, generator=generator).to(dtype)
    scheduler = wan_scheduler("euler", 5.0, 50)
    sigma = scheduler.sigmas[[0, 9, 20, 49]]
    got = noised(x0, noise, sigma)
    assert got.dtype == dtype
    want = scheduler.scale_noise(x0.double(), scheduler.timesteps[[0, 9, 20, 49]], noise.double())
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    v = velocity(x0, noise)
    torch.testing.assert_close(clean_of_velocity(got, v, sigma), x0, rtol=tolerance, atol=4 * tolerance)
    # The derivative of x_sigma by sigma.
    far, near = (noised(x0.double(), noise.double(), torch.tensor(s)) for s in (0.75, 0.25))
    torch.testing.assert_close((far - near) / 0.5, noise.double() - x0.double())


def test_bfloat16_samples_are_noised_in_float32() -> None:
    x0 = torch.full((1, 8), 1.0, dtype=torch.bfloat16)
    # In bfloat16, 1 - 0.998 is 0.0 or 0.0039.
    got = noised(x0, torch.zeros_like(x0), torch.tensor([0.998]))
    assert got[0, 0].item() == pytest.approx(0.002, rel=0.01)


def test_wrong_arguments_name_what_was_expected() -> None:
    with pytest.raises(ValueError, match=r"sigma must be in \[0, 1\], got 875"):
        shift_sigma(875, 5.0)
    with pytest.raises(ValueError, match=r"index fraction must be in \[0, 1\], got -0.1"):
        sigma_of_index_fraction(-0.1, 5.0)
    for shift in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="shift must be a number greater than 0"):
            sampling_sigmas(4, shift)
    for steps, skip in ((0, 0), (4, 4), (4, -1)):
        with pytest.raises(ValueError, match="0 <= skip < steps"):
            sampling_sigmas(steps, 5.0, skip)
    with pytest.raises(ValueError, match="unknown scheduler 'heun', expected one of unipc, euler"):
        sampling_sigmas(4, 5.0, scheduler="heun")  # type: ignore[arg-type]
    x = torch.zeros(3, 2, 2)
    with pytest.raises(ValueError, match=r"one value per sample, \(3,\), got \(2,\)"):
        noised(x, x, torch.ones(2))
