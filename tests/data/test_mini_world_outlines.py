"""Outlines of shapes, by what a distance is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning.data.mini_world.paint import OUTLINES

coordinate = st.floats(-2, 2, width=32)


@pytest.mark.parametrize("shape", sorted(OUTLINES))
def test_shapes_fill_the_unit_square(shape: str) -> None:
    axis = torch.linspace(-1.2, 1.2, 241)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    inside = OUTLINES[shape](x, y) < 0
    assert inside.float().mean() > 0.1
    assert max(x[inside].abs().max(), y[inside].abs().max()) <= 1.02
    assert max(x[inside].abs().max(), y[inside].abs().max()) >= 0.84


@pytest.mark.parametrize("shape", sorted(OUTLINES))
@settings(max_examples=60, deadline=None)
@given(ax=coordinate, ay=coordinate, bx=coordinate, by=coordinate)
def test_signed_distances_change_no_faster_than_the_way(shape: str, ax: float, ay: float, bx: float, by: float) -> None:
    first, second = OUTLINES[shape](torch.tensor([ax, bx]), torch.tensor([ay, by])).tolist()
    assert abs(first - second) <= np.hypot(ax - bx, ay - by) + 1e-5
