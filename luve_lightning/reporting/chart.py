"""Line charts as inline SVG: the places of everything here, the markup in `templates/chart.html`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 420, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 14, 40
_POINTS = 300
_LOG_FROM = 30.0  # values further apart than this factor are drawn on a logarithmic axis
COLOURS = 6


@dataclass(frozen=True)
class Series:
    """One line: `x` ascending, `y` finite, equally many."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]


@dataclass(frozen=True)
class Mark:
    """A vertical line at `x`, named in the legend."""

    name: str
    x: float


@dataclass(frozen=True)
class Chart:
    """What to draw.

    Attributes:
        title: heading and accessible name.
        x_label: below the axis.
        y_label: above the axis.
        series: at least one, each with a point.
        marks: vertical lines.
        y_range: lower and upper end of the axis; default from the values.
        logarithmic: None draws a logarithmic axis where the values, all positive, are further apart than 30x.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    marks: Sequence[Mark] = ()
    y_range: tuple[float, float] | None = None
    logarithmic: bool | None = None


@dataclass(frozen=True)
class DrawnSeries:
    """A line's points in the picture, and what the legend says of its values."""

    name: str
    points: str
    style: int
    first: float
    lowest: float
    highest: float
    last: float
    averaged: int


@dataclass(frozen=True)
class Tick:
    """Where a tick is, and its number."""

    at: float
    label: str


@dataclass(frozen=True)
class Drawing:
    """A chart with the places of its parts, in units of a picture of WIDTH x HEIGHT."""

    chart: Chart
    series: list[DrawnSeries]
    marks: list[tuple[str, float]]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    logarithmic: bool
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def draw_chart(chart: Chart) -> Drawing:
    """Lay a chart out. A line of more than 300 points is drawn through the means of neighbouring ones.

    Raises:
        ValueError: no line, or a line without points, with values that are not finite or of another number than x.
    """
    if not chart.series:
        raise ValueError(f"{chart.title}: nothing to draw")
    for line in chart.series:
        if not len(line.x) or line.x.shape != line.y.shape or not np.isfinite([line.x, line.y]).all():
            raise ValueError(
                f"{chart.title}: {line.name}: expected equally many finite x and y, at least one"
            )
    values = np.concatenate([line.y for line in chart.series])
    places = np.concatenate([line.x for line in chart.series] + [np.array([mark.x for mark in chart.marks])])
    low, high = chart.y_range or (float(values.min()), float(values.max()))
    logarithmic = chart.logarithmic
    if logarithmic is None:
        logarithmic = low > 0 and high / low > _LOG_FROM
    y_ticks = log_ticks(low, high) if logarithmic else nice_ticks(low, high)
    if chart.y_range is None:
        low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])
    x_low, x_high = float(places.min()), float(places.max())
    across = _Axis(x_low, x_high, _LEFT, WIDTH - _RIGHT)
    up = _Axis(low, high, HEIGHT - _BOTTOM, _TOP, logarithmic)
    return Drawing(
        chart,
        [_drawn(line, number, across, up) for number, line in enumerate(chart.series)],
        [(mark.name, across.place(mark.x)) for mark in chart.marks],
        _ticks([x for x in nice_ticks(x_low, x_high) if x_low <= x <= x_high], across),
        _ticks([y for y in y_ticks if low <= y <= high], up),
        logarithmic,
    )


def nice_ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose [low, high], about as many as asked for."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / max(1, about - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that enclose [low, high]; with 2 and 5 times them where they are few."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    inside = [tick for tick in ticks if low <= tick <= high]
    below, above = [t for t in ticks if t < low][-1:], [t for t in ticks if t > high][:1]
    return below + inside + above


class _Axis:
    """From values to places in the picture."""

    def __init__(self, low: float, high: float, start: float, end: float, logarithmic: bool = False) -> None:
        self.scale = np.log10 if logarithmic else np.asarray
        self.low, self.high = float(self.scale(low)), float(self.scale(high))
        self.start, self.end = start, end

    def places(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        span = (self.high - self.low) or 1.0
        share = (self.scale(values) - self.low) / span if self.high > self.low else np.full(len(values), 0.5)
        return np.clip(self.start + share * (self.end - self.start), -10.0, WIDTH + 10.0)

    def place(self, value: float) -> float:
        return round(float(self.places(np.array([value]))[0]), 1)


def _drawn(line: Series, number: int, across: _Axis, up: _Axis) -> DrawnSeries:
    bin_size = -(-len(line.x) // _POINTS)
    starts = np.arange(0, len(line.x), bin_size)
    counts = np.diff(np.append(starts, len(line.x)))
    x, y = (np.add.reduceat(values, starts) / counts for values in (line.x, line.y))
    points = zip(across.places(x), up.places(y), strict=True)
    return DrawnSeries(
        line.name,
        " ".join(f"{left:.1f},{top:.1f}" for left, top in points),
        number % COLOURS,
        float(line.y[0]),
        float(line.y.min()),
        float(line.y.max()),
        float(line.y[-1]),
        bin_size,
    )


def _ticks(values: Sequence[float], axis: _Axis) -> list[Tick]:
    return [Tick(axis.place(value), _number(value)) for value in values]


def _number(value: float) -> str:
    text = f"{value:.6g}"
    size = abs(value)
    if size >= 10_000 and size % 1000 == 0:
        return f"{value / 1000:g}k"
    return text
