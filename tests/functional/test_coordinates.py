"""Positions of an output grid on an input grid, against the definition in exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning.functional.interpolation import cell_size, nearest_indices, relative_offsets

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
