"""The Fréchet distance against closed forms and scipy's general matrix root."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cleanfid.fid import frechet_distance as scipy_distance
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luve_lightning.functional.patches import FrechetTarget, frechet_distance

SEEDS = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gaussian(seed: int, dim: int, samples: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of correlated samples."""
    x = draw(seed, samples, dim) @ draw(seed + 1, dim, dim) + draw(seed + 2, dim)
    return x.mean(0), torch.atleast_2d(x.T.cov())


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, dim=st.integers(1, 8))
def test_diagonal_covariances(seed: int, dim: int) -> None:
    """In one dimension: the squared difference of means and of standard deviations."""
    (m1, s1, m2, s2) = draw(seed, 4, dim)
    want = (m1 - m2).square().sum() + (s1.abs() - s2.abs()).square().sum()
    got = frechet_distance(m1, s1.square().diag(), m2, s2.square().diag())
    assert got == pytest.approx(want.item(), rel=1e-9, abs=1e-7)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_two_dimensions_that_do_not_commute(seed: int) -> None:
    """The trace of a 2x2 matrix' root is sqrt(trace + 2 sqrt(det))."""
    m1, c1 = gaussian(seed, 2, 9)
    m2, c2 = gaussian(seed + 10, 2, 9)
    product = c1 @ c2
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    want = (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * root
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(want.item(), rel=1e-8, abs=1e-7)


@pytest.mark.parametrize("dim", [3, 40])
def test_equals_scipy(dim: int) -> None:
    first, second = gaussian(0, dim, 4 * dim), gaussian(7, dim, 3 * dim)
    want = scipy_distance(*(x.numpy() for x in (*first, *second)))
    assert frechet_distance(*first, *second) == pytest.approx(want, rel=1e-9)


def test_equals_scipy_where_samples_are_fewer_than_dimensions() -> None:
    """Exactly: the nuclear norm of the centred samples' product."""
    x, y = draw(0, 12, 50), draw(1, 20, 50) + 0.3
    first, second = (x.mean(0), x.T.cov()), (y.mean(0), y.T.cov())
    overlap = torch.linalg.svdvals((x - x.mean(0)) @ (y - y.mean(0)).T).sum() / math.sqrt(11 * 19)
    want = (x.mean(0) - y.mean(0)).square().sum() + first[1].trace() + second[1].trace() - 2 * overlap
    got = frechet_distance(*first, *second)
    assert got == pytest.approx(want.item(), rel=1e-6)
    assert got == pytest.approx(scipy_distance(*(v.numpy() for v in (*first, *second))), rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, dim=st.integers(1, 6))
def test_covariances_of_rank_one_and_none(seed: int, dim: int) -> None:
    u, v, m = draw(seed, 3, dim)
    zero = torch.zeros(dim, dim, dtype=torch.float64)
    want = m.square().sum() + u @ u + v @ v - 2 * (u @ v).abs()
    assert frechet_distance(m, torch.outer(u, u), 0 * m, torch.outer(v, v)) == pytest.approx(want.item(), abs=1e-6)
    assert frechet_distance(m, zero, 0 * m, torch.outer(v, v)) == pytest.approx((m @ m + v @ v).item(), abs=1e-9)
    assert frechet_distance(m, zero, 0 * m, zero) == pytest.approx((m @ m).item(), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, dim=st.integers(1, 8), samples=st.integers(2, 20))
def test_is_a_distance_that_no_rotation_changes(seed: int, dim: int, samples: int) -> None:
    (m1, c1), (m2, c2) = gaussian(seed, dim, samples), gaussian(seed + 5, dim, 2 * samples)
    there = frechet_distance(m1, c1, m2, c2)
    scale = 1 + c1.trace().item() + c2.trace().item()
    assert there >= 0
    assert frechet_distance(m2, c2, m1, c1) == pytest.approx(there, abs=1e-6 * scale)
    assert frechet_distance(m1, c1, m1, c1) == pytest.approx(0, abs=1e-6 * scale)
    turn = torch.linalg.qr(draw(seed + 9, dim, dim))[0]
    turned = frechet_distance(turn @ m1, turn @ c1 @ turn.T, turn @ m2, turn @ c2 @ turn.T)
    assert turned == pytest.approx(there, abs=1e-6 * scale)


def test_is_computed_in_float64_whatever_comes_in() -> None:
    (m1, c1), (m2, c2) = gaussian(0, 5, 9), gaussian(3, 5, 9)
    rounded = [x.float() for x in (m1, c1, m2, c2)]
    assert frechet_distance(*rounded) == frechet_distance(*(x.double() for x in rounded))


def test_a_target_is_decomposed_once_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    (m1, c1), (m2, c2) = gaussian(0, 5, 9), gaussian(3, 5, 9)
    target = FrechetTarget.of(m1, c1)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    assert target.distance(m2, c2) == pytest.approx(scipy_distance(*(x.numpy() for x in (m1, c1, m2, c2))), rel=1e-9)


def test_bad_moments_are_refused() -> None:
    mean, cov = gaussian(0, 3, 9)
    broken = cov.clone()
    broken[0, 1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(mean, broken, mean, cov)
    with pytest.raises(ValueError, match="D x D"):
        frechet_distance(mean, cov[:2], mean, cov)
    with pytest.raises(ValueError, match="2 and 3 dimensions"):
        frechet_distance(mean, cov, mean[:2], cov[:2, :2])
