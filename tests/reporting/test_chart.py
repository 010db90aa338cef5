"""Where the parts of a chart are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luve_lightning.reporting.chart import (
    HEIGHT,
    WIDTH,
    Chart,
    Mark,
    Series,
    draw_chart,
    log_ticks,
    nice_ticks,
)

NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-6)


def chart(*lines: Series, **options: object) -> Chart:
    return Chart("a run", "step", "loss", lines, **options)  # type: ignore[arg-type]


def line(y: list[float], x: list[float] | None = None, name: str = "loss") -> Series:
    return Series(name, np.array(range(len(y)) if x is None else x, float), np.array(y, float))


@given(NUMBERS, NUMBERS)
def test_ticks_enclose_the_values_at_round_numbers(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    ticks = nice_ticks(low, high)
    steps = np.diff(ticks)
    slack = 1e-6 * (abs(low) + abs(high) + 1e-9)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 9
    assert np.allclose(steps, steps[0], rtol=1e-6)
    assert round(steps[0] / 10 ** np.floor(np.log10(steps[0] * 1.0001)), 6) in (1, 2, 5)


@given(st.floats(1e-8, 1e8), st.floats(1.01, 1e6))
def test_logarithmic_ticks_enclose_the_values(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert ticks == sorted(ticks)
    assert ticks[0] <= low * 1.0001
    assert ticks[-1] >= low * factor * 0.9999


@given(st.lists(NUMBERS, min_size=1, max_size=30), st.lists(NUMBERS, min_size=1, max_size=5))
def test_everything_is_inside_the_picture(first: list[float], second: list[float]) -> None:
    drawing = draw_chart(chart(line(first), line(second)))
    for drawn in drawing.series:
        for point in drawn.points.split():
            x, y = map(float, point.split(","))
            assert drawing.left - 0.1 <= x <= drawing.right + 0.1 <= WIDTH
            assert drawing.top - 0.1 <= y <= drawing.bottom + 0.1 <= HEIGHT


def test_higher_values_are_drawn_higher_and_the_legend_says_them() -> None:
    (drawn,) = draw_chart(chart(line([4.0, 1.0, 2.0]))).series
    y = [float(point.split(",")[1]) for point in drawn.points.split()]
    assert y[1] > y[2] > y[0]
    assert (drawn.first, drawn.lowest, drawn.highest, drawn.last, drawn.averaged) == (4, 1, 4, 2, 1)


def test_the_axis_is_logarithmic_where_values_are_far_apart() -> None:
    assert draw_chart(chart(line([1.0, 100.0]))).logarithmic
    assert not draw_chart(chart(line([1.0, 20.0]))).logarithmic
    assert not draw_chart(chart(line([0.0, 100.0]))).logarithmic
    ticks = draw_chart(chart(line([1.0, 10_000.0]))).y_ticks
    assert np.allclose(np.diff([tick.at for tick in ticks]), ticks[1].at - ticks[0].at, atol=0.2)
    assert ticks[-1].label == "10k"


def test_long_lines_are_drawn_through_means() -> None:
    (drawn,) = draw_chart(chart(line([0.0, 1.0] * 1000))).series
    assert drawn.averaged == 7
    assert len(drawn.points.split()) == 286
    assert (drawn.lowest, drawn.highest) == (0, 1)


def test_marks_lie_where_they_belong() -> None:
    drawing = draw_chart(chart(line([1.0, 2.0, 3.0], [0, 5, 10]), marks=[Mark("switch", 5.0)]))
    assert drawing.marks == [("switch", pytest.approx((drawing.left + drawing.right) / 2, abs=0.1))]


@pytest.mark.parametrize("bad", [line([]), line([1.0, float("nan")]), line([1.0], [0.0, 1.0])])
def test_what_cannot_be_drawn_is_named(bad: Series) -> None:
    with pytest.raises(ValueError, match="a run: loss: expected equally many finite x and y"):
        draw_chart(chart(bad))
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_chart(chart())
