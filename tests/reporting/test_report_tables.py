"""Where the little pictures of intervals put the rows."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luve_lightning.reporting.report import FAR, MetricTable, ResultLine

NAN = math.nan
DIFFERENCES = st.lists(st.floats(-1e6, 1e6).map(lambda value: round(value, 3)), max_size=6)


def table(*intervals: tuple[float, float, float]) -> MetricTable:
    """The reference row, then one row for each difference with its interval."""
    rows = [("reference", (0.0, NAN, NAN)), *((f"row {n}", ends) for n, ends in enumerate(intervals))]
    lines = [
        ResultLine(name, name, "", 3, 1.0, NAN, NAN, middle, low, high, "", "", "")
        for name, (middle, low, high) in rows
    ]
    return MetricTable("score", "", "lower", "", tuple(lines))


def test_a_row_far_from_the_others_is_an_arrow_and_leaves_them_their_room() -> None:
    near = table((1.9, 0.5, 3.0), (-0.6, -2.0, 0.8))
    far = table((1.9, 0.5, 3.0), (-0.6, -2.0, 0.8), (249.0, 200.0, 300.0))
    assert near.span() == far.span() == (-2.0, 3.0)
    assert far.place(249.0) == far.place(3.0) == 116
    assert [far.beyond(value) for value in (249.0, 3.0, -2.0, -249.0)] == [1, 0, 0, -1]


def test_two_rows_that_go_far_together_set_the_scale() -> None:
    assert table((1.0, 0.5, 1.5), (90.0, 80.0, 100.0), (70.0, 60.0, 80.0)).span() == (0.0, 100.0)


@given(DIFFERENCES)
def test_every_row_has_a_place_and_only_far_ones_are_arrows(differences: list[float]) -> None:
    drawn = table(*((value, NAN, NAN) for value in differences))
    places = [drawn.place(value) for value in differences]
    assert all(place is not None and 4 <= place <= 116 for place in places)
    order = sorted(range(len(differences)), key=lambda n: differences[n])
    assert [places[n] for n in order] == sorted(place for place in places if place is not None)
    arrows = [abs(value) for value in differences if drawn.beyond(value)]
    inside = [abs(value) for value in differences if not drawn.beyond(value)]
    assert not arrows or min(arrows) > FAR * max(inside) > 0


def test_no_number_has_no_place() -> None:
    assert table((NAN, NAN, NAN)).place(NAN) is None
    assert table((NAN, NAN, NAN)).place(0.0) == pytest.approx(60)
