"""Bands of noise: who is inside, and that nothing drawn is ever outside."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from luve_lightning.functional.noise_bands import (
    BellLossWeight,
    LogitNormalWeighting,
    LossWeight,
    SigmaBand,
    UniformLossWeight,
    index_fraction_of_sigma,
)
from tests.helpers.sampling_sigmas import sampling_sigmas

SHIFTS = st.floats(0.2, 20)
SWITCH = 5 / 12
LOW_FREQUENCY = SigmaBand.from_index_fractions(0, SWITCH, 5.0)
HIGH_FREQUENCY = SigmaBand.from_index_fractions(SWITCH, 1, 5.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_papers_bands() -> None:
    assert SigmaBand(0.875, 1.0) == LOW_FREQUENCY
    assert SigmaBand(0.0, 0.875) == HIGH_FREQUENCY
    assert LOW_FREQUENCY.index_fractions(5.0) == pytest.approx((0, SWITCH))
    sigmas = sampling_sigmas(50, 5.0, 10)[:-1]
    assert LOW_FREQUENCY.contains(sigmas).tolist() == [True] * 11 + [False] * 29
    assert torch.equal(HIGH_FREQUENCY.contains(sigmas), ~LOW_FREQUENCY.contains(sigmas))


@given(
    places=st.lists(st.floats(0.001, 0.999), min_size=1, max_size=4, unique=True),
    shift=SHIFTS,
    sigmas=st.lists(st.floats(0, 1), min_size=1, max_size=20),
)
def test_bands_that_share_their_ends_share_out_every_sigma(
    places: list[float], shift: float, sigmas: list[float]
) -> None:
    edges = [0.0, *sorted(places), 1.0]
    assume(min(b - a for a, b in itertools.pairwise(edges)) > 1e-5)
    bands = [SigmaBand.from_index_fractions(a, b, shift) for a, b in itertools.pairwise(edges)]
    values = [*sigmas, 0.0, 1.0, *(band.low for band in bands)]
    for dtype in (torch.float32, torch.float64):
        inside = torch.stack([band.contains(torch.tensor(values, dtype=dtype)) for band in bands])
        assert (inside.sum(0) == 1).all()
        # A number and a tensor are never judged differently.
        assert inside.tolist() == [[band.contains(value) for value in values] for band in bands]


def test_a_sigma_rounded_to_float32_stays_at_its_bound() -> None:
    for bound in np.linspace(0.01, 0.99, 99).tolist():
        upper, lower = SigmaBand(bound, 1.0), SigmaBand(0.0, bound)
        sigma = torch.tensor([bound, np.nextafter(np.float32(bound), np.float32(0))])
        assert upper.contains(sigma).tolist() == [True, False]
        assert lower.contains(sigma).tolist() == [False, True]
        assert upper.contains(bound)


@given(
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)), shift=SHIFTS, weighted=st.booleans(), seed=st.integers(0, 99)
)
def test_nothing_is_drawn_outside_the_band(
    bounds: tuple[float, float], shift: float, weighted: bool, seed: int
) -> None:
    low, high = sorted(bounds)
    assume(np.float32(low) < np.float32(high))  # down to one float32 wide
    band = SigmaBand(low, high)
    weighting = torch.exp if weighted else None
    sigma = band.sample(64, shift, generator(seed), weighting=weighting)
    assert sigma.shape == (64,)
    assert sigma.dtype == torch.float32
    assert band.contains(sigma).all()
    levels = band.levels(7, shift)
    assert band.contains(levels).all()
    assert (levels.diff() <= 0).all()


def ks_distance(drawn: np.ndarray, cdf: np.ndarray) -> float:
    """Largest gap between the empirical distribution and the values of the true one at the sorted draws."""
    n = len(drawn)
    return float(max(np.abs(np.arange(1, n + 1) / n - cdf).max(), np.abs(np.arange(n) / n - cdf).max()))


@pytest.mark.parametrize("band", [LOW_FREQUENCY, HIGH_FREQUENCY, SigmaBand()])
def test_draws_are_uniform_in_the_index(band: SigmaBand) -> None:
    sigma = band.sample(20_000, 5.0, generator())
    fraction = np.sort(index_fraction_of_sigma(sigma.double(), 5.0).numpy())
    start, stop = band.index_fractions(5.0)
    # 1.95 / sqrt(n) is the 0.1 % point of the statistic.
    assert ks_distance(fraction, (fraction - start) / (stop - start)) < 1.95 / 20_000**0.5


def test_draws_follow_a_weighting() -> None:
    def rising(fraction: torch.Tensor) -> torch.Tensor:
        return fraction - SWITCH

    sigma = HIGH_FREQUENCY.sample(20_000, 5.0, generator(), weighting=rising)
    part = np.sort((index_fraction_of_sigma(sigma.double(), 5.0).numpy() - SWITCH) / (1 - SWITCH))
    assert ks_distance(part, part**2) < 1.95 / 20_000**0.5
    # The logit of the unshifted sigma is normal.
    sigma = SigmaBand().sample(20_000, 5.0, generator(), weighting=LogitNormalWeighting(0.5, 0.8))
    logit = torch.logit(1 - index_fraction_of_sigma(sigma.double(), 5.0))
    assert logit.mean().item() == pytest.approx(0.5, abs=0.02)
    assert logit.std().item() == pytest.approx(0.8, abs=0.02)


def test_a_weighting_never_lands_where_it_is_zero() -> None:
    def gap(fraction: torch.Tensor) -> torch.Tensor:
        return ((fraction > 0.5) & (fraction < 0.75)).double()

    fraction = index_fraction_of_sigma(SigmaBand().sample(5000, 3.0, generator(), weighting=gap).double(), 3.0)
    assert fraction.min() >= 0.5 - 1e-6
    assert fraction.max() <= 0.75 + 1e-6


def test_draws_come_from_the_generator_alone() -> None:
    plain, weighted = generator(3), generator(3)
    first = LOW_FREQUENCY.sample(5, 5.0, plain)
    # A constant weighting is none, and however it is weighted, the generator goes on from the same place.
    same = LOW_FREQUENCY.sample(5, 5.0, weighted, weighting=torch.ones_like)
    torch.testing.assert_close(first, same)
    assert torch.equal(plain.get_state(), weighted.get_state())
    assert not torch.equal(first, LOW_FREQUENCY.sample(5, 5.0, plain))


def test_levels_are_the_middles_of_equal_parts() -> None:
    start, stop = LOW_FREQUENCY.index_fractions(5.0)
    middles = index_fraction_of_sigma(LOW_FREQUENCY.levels(4, 5.0), 5.0)
    want = torch.tensor([start + (stop - start) * part for part in (0.125, 0.375, 0.625, 0.875)])
    torch.testing.assert_close(middles, want, rtol=0, atol=1e-5)


def test_wrong_bands_and_arguments_name_what_was_expected() -> None:
    nan = float("nan")
    for low, high in ((0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (0.5, 1.1), (nan, 1), (0, nan), (0.5, 0.5 + 1e-12)):
        with pytest.raises(ValueError, match="0 <= low < high <= 1"):
            SigmaBand(low, high)
    with pytest.raises(ValueError, match="bfloat16: choose the band before the cast"):
        LOW_FREQUENCY.contains(torch.tensor([0.875], dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="is zero in the whole band"):
        LOW_FREQUENCY.sample(2, 5.0, generator(), weighting=torch.zeros_like)
    with pytest.raises(ValueError, match="one finite density >= 0"):
        LOW_FREQUENCY.sample(2, 5.0, generator(), weighting=lambda fraction: -fraction)


def diffsynth_weights(shift: float, steps: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps of the schedule and their weights, number by number as DiffSynth-Studio's scheduler makes them."""
    s = [1 - i / steps for i in range(steps)]
    x = np.array([steps * shift * v / (1 + (shift - 1) * v) for v in s])
    y = np.exp(-2 * ((x - steps / 2) / steps) ** 2)
    return x, (y - y.min()) * steps / (y - y.min()).sum()


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
def test_the_bell_weight_is_diffsynths_at_the_steps_of_its_schedule(shift: float) -> None:
    x, want = diffsynth_weights(shift)
    got = BellLossWeight()(torch.from_numpy(x / 1000), shift)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-6)
    few, of_few = diffsynth_weights(shift, 10)
    np.testing.assert_allclose(BellLossWeight(10)(torch.from_numpy(few / 10), shift).numpy(), of_few, rtol=1e-5)


def test_what_the_bell_weight_does_to_the_papers_experts() -> None:
    """Of levels as training draws them: the means in both bands, and what the highest noise carries."""
    weight = BellLossWeight()
    drawn = {band: band.sample(200_000, 5.0, generator(1)) for band in (LOW_FREQUENCY, HIGH_FREQUENCY)}
    low, high = (weight(sigmas, 5.0).double() for sigmas in drawn.values())
    assert low.mean().item() == pytest.approx(0.34, abs=0.005)
    assert high.mean().item() == pytest.approx(1.47, abs=0.005)
    highest = drawn[LOW_FREQUENCY] >= 0.975
    assert highest.double().mean().item() == pytest.approx(0.27, abs=0.005)
    assert (low[highest].sum() / low.sum()).item() == pytest.approx(0.06, abs=0.005)
    x, want = diffsynth_weights(5.0)
    for sigmas, weights in ((x >= 875, low), (x < 875, high)):
        assert weights.mean().item() == pytest.approx(want[sigmas].mean(), rel=0.01)


@given(sigmas=st.lists(st.floats(0, 1), min_size=1, max_size=20), shift=SHIFTS)
def test_loss_weights_are_finite_and_never_negative(sigmas: list[float], shift: float) -> None:
    drawn = torch.tensor(sigmas)
    for weight in (UniformLossWeight(), BellLossWeight()):
        found = weight(drawn, shift)
        assert found.shape == drawn.shape
        assert found.isfinite().all()
        assert (found >= 0).all()
    assert torch.equal(UniformLossWeight()(drawn, shift), torch.ones_like(drawn))


def test_mistakes_in_loss_weights() -> None:
    with pytest.raises(ValueError, match="steps: expected at least 2, got 1"):
        BellLossWeight(1)
    with pytest.raises(NotImplementedError, match="LossWeight weighs nothing"):
        LossWeight()(torch.ones(1), 5.0)
