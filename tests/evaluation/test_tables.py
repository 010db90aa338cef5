"""Tables as CSV, Markdown and on the terminal."""

from __future__ import annotations

import csv
import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from luve_lightning.evaluation.tables import booktabs, escape, format_value, table_csv, table_markdown, table_rich

COLUMNS = ("method", "psnr", "clips")
ROWS = [{"method": "a|b", "psnr": 29.416666, "clips": 24}, {"clips": 3, "psnr": math.nan, "method": "[none]"}]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (29.416666, "29.42"),
        (0.034567, "0.03457"),
        (601.04, "601.0"),
        (72831.4, "72831"),
        (0.00001234, "0.000012"),
        (-1.5, "-1.500"),
        (0.0, "0"),
        (math.nan, ""),
        (None, ""),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (24, "24"),
        ("vae", "vae"),
    ],
)
def test_values_as_a_reader_wants_them(value: object, text: str) -> None:
    assert format_value(value) == text


@given(st.floats(1e-3, 1e6))
def test_four_digits_are_kept(value: float) -> None:
    assert float(format_value(value)) == pytest.approx(value, rel=5.1e-4)


def test_csv_has_the_columns_in_order_and_empty_cells_for_nothing() -> None:
    text = table_csv(COLUMNS, ROWS)
    assert text == "method,psnr,clips\na|b,29.4167,24\n[none],,3\n"


@given(st.lists(st.floats(allow_nan=False, width=32), max_size=5), st.text(st.characters(codec="utf-8"), max_size=8))
def test_csv_reads_back(values: list[float], name: str) -> None:
    rows = [{"name": name, "value": value} for value in values]
    read = list(csv.DictReader(io.StringIO(table_csv(["name", "value"], rows), newline="")))
    assert [row["name"] for row in read] == [name] * len(values)
    assert [float(row["value"]) for row in read] == pytest.approx(values, rel=1e-5)


def test_markdown_escapes_bars_and_aligns_numbers() -> None:
    assert table_markdown(COLUMNS, ROWS) == (
        "| method | psnr | clips |\n| --- | ---: | ---: |\n| a\\|b | 29.42 | 24 |\n| [none] |  | 3 |\n"
    )


def test_the_terminal_shows_every_cell_in_80_columns() -> None:
    columns = ("method", "latent_l1", "psnr_rgb", "ssim", "frame_diff", "ms", "peak_mib")
    row = dict.fromkeys(columns, 1234.5) | {"method": "vluer_shipped"}
    stream = io.StringIO()
    Console(file=stream, width=80).print(table_rich(columns, [row], "test, 2x"))
    assert stream.getvalue().splitlines()[0].strip() == "test, 2x"
    for word in (*columns, "vluer_shipped"):
        assert word in stream.getvalue()
    assert stream.getvalue().count("1234") == 6


def test_brackets_are_no_markup_on_the_terminal() -> None:
    stream = io.StringIO()
    Console(file=stream, width=80).print(table_rich(COLUMNS, ROWS))
    assert "[none]" in stream.getvalue()


@pytest.mark.parametrize("function", [table_csv, table_markdown, table_rich])
def test_rows_of_another_table_are_refused(function: object) -> None:
    with pytest.raises(ValueError, match="a row has the columns method, psnr, expected method, psnr, clips"):
        function(COLUMNS, [{"method": "a", "psnr": 1.0}])  # type: ignore[operator]


def test_what_means_something_to_latex_is_escaped() -> None:
    assert escape("fd_patch 50% a&b #1 {x}^2 ~ \\") == (
        r"fd\_patch 50\% a\&b \#1 \{x\}\textasciicircum{}2 \textasciitilde{} \textbackslash{}"
    )


def test_a_table_with_rules_and_notes() -> None:
    text = booktabs(["Method", "$n$"], [["a", "1"], ["b", "2"]], ["two\nlines"])
    assert text == (
        "% two lines\n\\begin{tabular}{lr}\n\\toprule\nMethod & $n$ \\\\\n\\midrule\n"
        "a & 1 \\\\\nb & 2 \\\\\n\\bottomrule\n\\end{tabular}\n"
    )
    with pytest.raises(ValueError, match="every row needs 2 cells"):
        booktabs(["Method", "$n$"], [["a"]])
