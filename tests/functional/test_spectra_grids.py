"""What grids can hold, against SciPy's cosine transform."""

from __future__ import annotations

import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luve_lightning.functional.spectra import between_grids, cosine_coefficients, luma_of

SIDES = st.integers(1, 12)


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(SIDES, SIDES, st.integers(0, 99))
def test_coefficients_are_those_of_the_transform(height: int, width: int, seed: int) -> None:
    values = pictures(2, height, width, seed=seed)
    expected = torch.from_numpy(scipy.fft.dctn(values.numpy(), axes=(1, 2), norm="ortho"))
    torch.testing.assert_close(cosine_coefficients(values), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(cosine_coefficients(values.float()), expected.float(), atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(SIDES, SIDES, st.data())
def test_a_band_has_the_coefficients_that_one_grid_holds_and_another_does_not(
    height: int, width: int, choice: st.DataObject
) -> None:
    inner, outer = ((choice.draw(st.integers(1, height)), choice.draw(st.integers(1, width))) for _ in range(2))
    values = pictures(3, height, width)
    coefficients = torch.from_numpy(scipy.fft.dctn(values.numpy(), axes=(1, 2), norm="ortho"))
    wanted = torch.zeros(height, width, dtype=torch.bool)
    wanted[: outer[0], : outer[1]] = True
    wanted[: inner[0], : inner[1]] = False
    expected = torch.from_numpy(scipy.fft.idctn((coefficients * wanted).numpy(), axes=(1, 2), norm="ortho"))
    torch.testing.assert_close(between_grids(values, inner, outer), expected, atol=1e-12, rtol=1e-12)
    low, high = between_grids(values, None, inner), between_grids(values, inner)
    torch.testing.assert_close(low + high, values, atol=1e-12, rtol=1e-12)


def test_luma_is_between_black_and_white() -> None:
    frames = torch.tensor([[[[0, 0, 0], [255, 255, 255], [0, 255, 0]]]], dtype=torch.uint8)
    torch.testing.assert_close(luma_of(frames)[0, 0], torch.tensor([0, 1, 0.7152]))


def test_bad_input_is_one_line() -> None:
    for transform in (cosine_coefficients, lambda values: between_grids(values, (1, 1))):
        with pytest.raises(ValueError, match=r"^pictures: expected floating point ... x H x W, got uint8 3 x 4$"):
            transform(torch.zeros(3, 4, dtype=torch.uint8))
