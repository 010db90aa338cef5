"""Positions of an output grid on an input grid, against the definition in exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning.functional.interpolation import (
    cell_size,
    check_size,
    interpolate_latents,
    nearest_indices,
    relative_offsets,
    take_sorted,
)

sizes = st.integers(1, 400)


@settings(max_examples=150, deadline=None)
@given(n_in=sizes, n_out=sizes)
def test_the_nearest_cell_holds_the_output_centre(n_in: int, n_out: int) -> None:
    indices = nearest_indices(n_in, n_out)
    assert indices.dtype == torch.int64
    centres = [Fraction(2 * i + 1, 2 * n_out) for i in range(n_out)]
    assert indices.tolist() == [math.floor(c * n_in) for c in centres]


@settings(max_examples=150, deadline=None)
@given(n_in=sizes, n_out=sizes)
def test_offsets_are_distances_from_the_cells_centre_in_cells(n_in: int, n_out: int) -> None:
    offsets = relative_offsets(n_in, n_out)
    assert offsets.dtype == torch.float32
    assert offsets.min() >= -0.5
    assert offsets.max() < 0.5
    want = []
    for i in range(n_out):
        position = Fraction(2 * i + 1, 2 * n_out) * n_in
        want.append(float(position - math.floor(position) - Fraction(1, 2)))
    torch.testing.assert_close(offsets, torch.tensor(want), rtol=1e-6, atol=1e-7)


def test_huge_grids_lose_no_precision() -> None:
    n_in, n_out = 100_003, 150_001
    i = n_out - 2
    position = Fraction(2 * i + 1, 2 * n_out) * n_in
    assert nearest_indices(n_in, n_out)[i] == math.floor(position)
    want = float(position - math.floor(position) - Fraction(1, 2))
    assert relative_offsets(n_in, n_out)[i].item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 7, 33])
def test_equal_grids_fall_on_each_other(n: int) -> None:
    assert nearest_indices(n, n).tolist() == list(range(n))
    assert relative_offsets(n, n).tolist() == [0.0] * n
    assert cell_size(n, n) == 1


def test_cells_at_2x_and_below_1x() -> None:
    assert cell_size(4, 8) == 0.5
    assert relative_offsets(4, 8).tolist() == [-0.25, 0.25] * 4
    assert cell_size(6, 4) == 1.5
    assert nearest_indices(3, 1).tolist() == [1]


@pytest.mark.parametrize(("n_in", "n_out"), [(0, 4), (4, 0), (-1, 4), (4, -2)])
def test_empty_grids_are_refused(n_in: int, n_out: int) -> None:
    for function in (nearest_indices, relative_offsets, cell_size):
        with pytest.raises(ValueError, match=f"at least 1, got {n_in} -> {n_out}"):
            function(n_in, n_out)


MODES = ("nearest", "bilinear", "bicubic")


def nearest_weight(x: float) -> float:
    return float(-0.5 <= x < 0.5)


def linear_weight(x: float) -> float:
    return max(0.0, 1 - abs(x))


def cubic_weight(x: float) -> float:
    """Keys' cubic with a = -0.75, torch's choice without antialiasing."""
    a, x = -0.75, abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resampling_matrix(n_in: int, n_out: int, weight: Any) -> np.ndarray:
    """Rows of weights; positions outside repeat the border."""
    matrix = np.zeros((n_out, n_in))
    for i in range(n_out):
        x = (i + 0.5) * n_in / n_out - 0.5
        for j in range(math.floor(x) - 2, math.floor(x) + 4):
            matrix[i, min(max(j, 0), n_in - 1)] += weight(j - x)
    return matrix


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 7), st.integers(1, 21), st.integers(1, 21)),
)
def test_equals_one_matrix_an_axis(mode: Any, shape: tuple[int, ...], size: tuple[int, int, int]) -> None:
    kernels = {
        # Half-way positions belong to the later cell: nudge the kernel there.
        "nearest": [lambda d: nearest_weight(-d + 1e-9)] * 3,
        "bilinear": [linear_weight] * 3,
        "bicubic": [linear_weight, cubic_weight, cubic_weight],
    }[mode]
    matrices = [resampling_matrix(i, o, k) for i, o, k in zip(shape, size, kernels, strict=True)]
    latents = noise(2, 3, *shape)
    want = np.einsum("bcthw,Tt,Hh,Ww->bcTHW", latents.double().numpy(), *matrices)
    got = interpolate_latents(latents, size, mode)
    assert got.shape == (2, 3, *size)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unchanged_size_changes_nothing(mode: Any, dtype: torch.dtype) -> None:
    latents = noise(2, 4, 3, 5, 7).to(dtype)
    got = interpolate_latents(latents, (3, 5, 7), mode)
    assert got.dtype == dtype
    assert torch.equal(got, latents)


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_stays_near_float32(mode: Any) -> None:
    latents = noise(1, 4, 3, 5, 7).bfloat16()
    got = interpolate_latents(latents, (3, 8, 9), mode)
    assert got.dtype == torch.bfloat16
    want = interpolate_latents(latents.float(), (3, 8, 9), mode)
    torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_reach_every_input_that_is_sampled(mode: Any) -> None:
    latents = noise(1, 2, 2, 3, 3).requires_grad_()
    interpolate_latents(latents, (4, 6, 6), mode).sum().backward()
    assert latents.grad is not None
    # Each input feeds eight outputs' worth of weight; at the borders more or less, in sum exactly.
    assert latents.grad.sum().item() == pytest.approx(2 * 4 * 6 * 6, rel=1e-5)
    assert (latents.grad != 0).all()


@given(n_in=st.integers(1, 40), n_out=st.integers(1, 120), axis=st.integers(0, 2))
def test_what_is_taken_in_order_has_the_gradient_of_index_select(n_in: int, n_out: int, axis: int) -> None:
    """To the bit on a CPU, where that is a sum in order, too."""
    index = nearest_indices(n_in, n_out)
    shape = [3, 2, 2]
    shape[axis] = n_in
    x = torch.randn(shape, generator=torch.Generator().manual_seed(n_in * n_out)).requires_grad_()
    weight = torch.randn(x.index_select(axis, index).shape, generator=torch.Generator().manual_seed(1))
    got = take_sorted(x, axis, index, most=-(-n_out // n_in))
    torch.testing.assert_close(got, x.index_select(axis, index), rtol=0, atol=0)
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (got, x.index_select(axis, index))]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_wrong_arguments_name_what_was_expected() -> None:
    latents = noise(1, 2, 2, 3, 3)
    with pytest.raises(ValueError, match="B x C x T x h x w"):
        interpolate_latents(latents[0], (2, 3, 3))
    with pytest.raises(ValueError, match="unknown interpolation mode 'cubic', expected one of nearest, bilinear"):
        interpolate_latents(latents, (2, 3, 3), "cubic")  # type: ignore[arg-type]
    for size in ((2, 3), (2, 3, 0), (2, -3, 4), (2, 3.5, 4)):
        with pytest.raises(ValueError, match="each an integer >= 1"):
            check_size(size)  # type: ignore[arg-type]
    assert check_size((2, 3.0, np.int64(4))) == (2, 3, 4)  # type: ignore[arg-type]
