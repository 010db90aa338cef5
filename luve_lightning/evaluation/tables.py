"""Tables as text: LaTeX, CSV, Markdown and the terminal."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}


def escape(text: str) -> str:
    """Text escaped for LaTeX."""
    return "".join(_SPECIAL.get(c, c) for c in text)


def booktabs(header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    r"""A tabular with booktabs' rules (`\usepackage{booktabs}`).

    Args:
        header: column headings in LaTeX; the first column is aligned left, the others right.
        rows: cells, LaTeX.
        notes: plain text, written above as comments.

    Raises:
        ValueError: a row of another length.
    """
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"every row needs {len(header)} cells")
    lines = [f"% {' '.join(note.split())}" for note in notes]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule"]
    lines += [f"{' & '.join(header)} \\\\", r"\midrule"]
    lines += [f"{' & '.join(row)} \\\\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


Row = Mapping[str, Any]


def format_value(value: Any) -> str:
    """A value for people: four significant digits without exponents; NaN and None are empty."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return ""
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    decimals = 3 - math.floor(math.log10(abs(value)))
    return f"{value:.{min(max(decimals, 0), 6)}f}"


def table_csv(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """A table as CSV: floats with six significant digits (`g`), NaN and None empty, lines end in a newline.

    Raises:
        ValueError: when a row's keys are not the columns.
    """
    _check(columns, rows)
    lines = [columns, *([_csv_value(row[column]) for column in columns] for row in rows)]
    return "".join(f"{_csv_line(line)}\n" for line in lines)


def _csv_line(cells: Sequence[object]) -> str:
    """One line, without its end. The writer quotes a carriage return only if that is part of its line ends."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(cells)
    return text.getvalue().removesuffix("\r\n")


def table_markdown(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """A table as GitHub Markdown, with numbers aligned right.

    Raises:
        ValueError: when a row's keys are not the columns.
    """
    _check(columns, rows)
    rule = ["---:" if _is_numeric(column, rows) else "---" for column in columns]
    body = [[format_value(row[column]).replace("|", "\\|") for column in columns] for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [list(columns), rule, *body])


def table_rich(columns: Sequence[str], rows: Sequence[Row], title: str = "") -> Table:
    """A table for `rich.console.Console.print`.

    Raises:
        ValueError: when a row's keys are not the columns.
    """
    _check(columns, rows)
    # No outer edge and single padding: eight columns of numbers fit a terminal of 80.
    table = Table(
        title=title or None,
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in columns:
        table.add_column(column, justify="right" if _is_numeric(column, rows) else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(format_value(row[column])) for column in columns))  # Text: brackets are no markup
    return table


def _check(columns: Sequence[str], rows: Sequence[Row]) -> None:
    for row in rows:
        if set(row) != set(columns):
            raise ValueError(f"a row has the columns {', '.join(row)}, expected {', '.join(columns)}")


def _csv_value(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return "" if value is None else str(value)


def _is_numeric(column: str, rows: Sequence[Row]) -> bool:
    values = [row[column] for row in rows if row[column] is not None]
    return bool(values) and all(isinstance(value, int | float) for value in values)
