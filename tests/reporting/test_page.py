"""Pages of one file, and where the parts of a chart are."""

from __future__ import annotations

import base64
import hashlib
import re
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning.reporting.page import Chart, Mark, Series, data_uri, render_document

NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-6)


def page() -> str:
    context = {
        "title": "<script>x</script>", "raters": 2, "trials": 1, "axes": {"a": "b?"}, "positions": "AB",
        "columns": 2, "data": "{}",
    }  # fmt: skip
    return render_document("study.html", ("base.css", "study.css"), ("study.js",), context)


@pytest.mark.parametrize("tag", ["style", "script"])
def test_the_policy_names_the_hash_of_what_is_in_the_page(tag: str) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page())
    assert policy
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page(), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert f"{tag}-src &#39;sha256-{digest}&#39;;" in policy[1] or f"{tag}-src 'sha256-{digest}';" in policy[1]


def test_text_is_escaped() -> None:
    assert "<title>&lt;script&gt;x&lt;/script&gt;</title>" in page()


def test_a_data_address_holds_the_bytes() -> None:
    assert data_uri(b"\x00\xff", "image/webp") == "data:image/webp;base64,AP8="


def test_an_installed_package_has_every_template(repository: Path) -> None:
    """setuptools takes no files but Python's unless pyproject.toml names them."""
    listed = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = repository / "luve_lightning"
    others = {p for p in package.rglob("*") if p.is_file() and p.suffix in (".html", ".css", ".js")}
    assert len(others) >= 8
    found = {
        path
        for name, patterns in listed.items()
        for pattern in patterns
        for path in (repository / name.replace(".", "/")).glob(pattern)
    }
    assert others <= found


def chart(*lines: Series, **options: object) -> Chart:
    return Chart("a run", "step", "loss", lines, **options)  # type: ignore[arg-type]


def line(y: list[float], x: list[float] | None = None, name: str = "loss") -> Series:
    return Series(name, np.array(range(len(y)) if x is None else x, float), np.array(y, float))


def paths(plot: Chart, colour: str) -> list[np.ndarray]:
    """The points of every path of a colour, N x 2, in the picture's units; y grows downwards."""
    found = [p for p in ET.fromstring(plot.svg).iter() if p.get("stroke") == f"var(--{colour})"]
    numbers = [re.findall(r"[-\d.]+", path.get("d", "")) for path in found]
    return [np.array(values, float).reshape(-1, 2) for values in numbers]


def labels(plot: Chart) -> list[str]:
    return [element.text or "" for element in ET.fromstring(plot.svg).iter() if element.tag.endswith("text")]


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=30), st.lists(NUMBERS, min_size=1, max_size=5))
def test_everything_is_inside_the_picture(first: list[float], second: list[float]) -> None:
    plot = chart(line(first), line(second))
    assert 'viewBox="0 0 420 260"' in plot.svg
    for points in (*paths(plot, "s0"), *paths(plot, "s1"), *paths(plot, "line")):
        assert (points >= 0).all()
        assert (points <= (420, 260)).all()


def test_higher_values_are_drawn_higher() -> None:
    (points,) = paths(chart(line([4.0, 1.0, 2.0])), "s0")
    assert points[1, 1] > points[2, 1] > points[0, 1]
    assert (np.diff(points[:, 0]) > 0).all()


def test_the_axis_is_logarithmic_where_values_are_far_apart() -> None:
    assert chart(line([1.0, 100.0])).scale == "log"
    assert chart(line([1.0, 20.0])).scale == "linear"
    assert chart(line([0.0, 100.0])).scale == "linear"
    assert chart(line([1.0, 20.0]), logarithmic=True).scale == "log"
    plot = chart(line([1.0, 100.0, 10_000.0]))
    (points,) = paths(plot, "s0")
    assert points[0, 1] - points[1, 1] == pytest.approx(points[1, 1] - points[2, 1], abs=0.2)
    assert {"1", "100", "10000"} <= set(labels(plot))
    assert {"0.01", "0.02", "0.03"} <= set(labels(chart(line([0.01, 0.03]))))


def test_long_lines_are_drawn_through_means() -> None:
    long = line([0.0, 1.0] * 1000)
    assert long.averaged == 7
    x, y = long.drawn()
    assert len(x) == len(y) == 286
    assert x[0] == 3
    assert y[0] == pytest.approx(3 / 7)


def test_one_value_is_a_dot() -> None:
    (points,) = paths(chart(line([2.0])), "s0")
    assert np.array_equal(points[0], points[1])


def test_marks_lie_where_they_belong() -> None:
    plot = chart(line([1.0, 2.0, 3.0], [0, 5, 10]), marks=[Mark("switch", 5.0)])
    (points,), (mark,) = paths(plot, "s0"), paths(plot, "ink")
    assert (mark[:, 0] == points[1, 0]).all()
    assert mark[:, 1].min() < points[:, 1].min() < points[:, 1].max() < mark[:, 1].max()


def test_a_given_range_is_the_axis() -> None:
    plot = chart(line([-0.5, 0.5, 1.0]), y_range=(0.0, 1.0))
    (points,), (zero, *_) = paths(plot, "s0"), paths(plot, "line")
    assert points[0, 1] == pytest.approx(zero[0, 1], abs=0.1), "what is beyond lies at the end"
    assert labels(plot)[-6:] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]


def test_a_picture_holds_no_style_no_address_and_no_identity() -> None:
    """A page's policy forbids the first two, and two charts of one page must not share the third."""
    svg = chart(line([1.0, 2.0]), line([3.0]), marks=[Mark("x", 0.5)]).svg
    assert not re.search(r"style|url|href| id=|font-family|#", svg)
    assert len(svg) < 4000


@pytest.mark.parametrize("bad", [line([]), line([1.0, float("nan")]), line([1.0], [0.0, 1.0])])
def test_what_cannot_be_drawn_is_named(bad: Series) -> None:
    with pytest.raises(ValueError, match="a run: loss: expected equally many finite x and y"):
        chart(bad)
    with pytest.raises(ValueError, match="nothing to draw"):
        chart()
