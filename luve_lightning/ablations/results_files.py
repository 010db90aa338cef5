"""A table's results as files: CSV, JSON with their provenance, and Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from luve_lightning.ablations.results import COLUMNS, Direction, Results, result_rows
from luve_lightning.ablations.table import Table
from luve_lightning.evaluation.tables import format_value, table_csv, table_markdown
from luve_lightning.files import read_json, write_text

_NUMBERS = ("mean", "low", "high", "difference", "difference_low", "difference_high")
_ABOUT = (
    "Each value is a mean over seeds with its 95 % interval by Student's t (none for one seed). Differences are from "
    "the row `{reference}`, paired by seed, with intervals of their own. Direction: whether a difference goes the "
    "paper's way, `none` where its interval holds 0 or there is one seed only. Paper: the paper's value, of the metric "
    "in brackets, on another world with other models: compare directions, never values."
)


@dataclass(frozen=True)
class ResultsProvenance:
    """Where results come from.

    Attributes:
        command: command that wrote them.
        revision: revision of this repository.
        device: device that computed them.
        packages: versions by name.
        date: in ISO format.
    """

    command: str
    revision: str
    device: str
    packages: Mapping[str, str]
    date: str


@dataclass(frozen=True)
class ResultsFile:
    """Results read back from the files of `write_results`.

    Attributes:
        rows: rows by `COLUMNS`, at least one. Means, differences and their ends are numbers, NaN for none; the
            paper's values are as in the file.
        about: the JSON file beside it; empty without one.
    """

    rows: list[dict[str, Any]]
    about: dict[str, Any]


def write_results(
    table: Table,
    results: Results,
    failed: Mapping[str, Mapping[int, str]],
    provenance: ResultsProvenance,
    path: Path,
) -> list[Path]:
    """Write the table beside `path`, a CSV, as .csv, .json and .md.

    Args:
        table: what it is.
        results: the table's numbers.
        failed: the reason for each row and seed without numbers.
        provenance: where they come from.
        path: path of the CSV.

    Returns:
        The written files.
    """
    rows = result_rows(table, results.values)
    files = {
        path: table_csv(COLUMNS, rows),
        path.with_suffix(".json"): _json(table, results, failed, provenance),
        path.with_suffix(".md"): results_markdown(table, results, rows, failed, provenance),
    }
    for file, text in files.items():
        write_text(file, text)
    return list(files)


def read_results(path: Path) -> ResultsFile:
    """Read a table and, if it exists, the JSON file beside it.

    Raises:
        FileNotFoundError: no such table.
        ValueError: other columns, invalid values, or not JSON; one line, which does not name the table.
    """
    if not path.is_file():
        raise FileNotFoundError("missing")
    reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
    lacking = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
    if lacking:
        raise ValueError(f"no table of results: the columns {', '.join(lacking)} are missing")
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"line {reader.line_num}: expected one value per column")
        rows.append(_parsed(row))
    if not rows:
        raise ValueError("a table of results without a row")
    beside = path.with_suffix(".json")
    return ResultsFile(rows, read_json(beside) if beside.is_file() else {})


def _parsed(row: dict[str, Any]) -> dict[str, Any]:
    for name, known in (("better", ("higher", "lower", "")), ("direction", get_args(Direction))):
        if row[name] not in known:
            choices = ", ".join(repr(choice) for choice in known)
            raise ValueError(f"{_place(row, name)}: expected one of {choices}, got {row[name]!r}")
    numbers = {name: _number(row, name) for name in _NUMBERS}
    seeds = _number(row, "seeds")
    return row | numbers | {"seeds": 0 if math.isnan(seeds) else int(seeds)}


def _number(row: Mapping[str, str], key: str) -> float:
    try:
        return float(row[key]) if row[key].strip() else math.nan
    except ValueError:
        raise ValueError(f"{_place(row, key)}: expected a number, got {row[key]!r}") from None


def _place(row: Mapping[str, str], key: str) -> str:
    return f"row {row['row']}, metric {row['metric']}: {key}"


def _json(
    table: Table, results: Results, failed: Mapping[str, Mapping[int, str]], provenance: ResultsProvenance
) -> str:
    content = {
        "table": table.name,
        "title": table.title,
        "world": table.world,
        "note": table.note,
        "reference": table.reference,
        "settings": dict(table.settings),
        "seeds": sorted({seed for found in results.values.values() for seed in found}),
        "command": provenance.command,
        "revision": provenance.revision,
        "device": provenance.device,
        "packages": dict(provenance.packages),
        "date": provenance.date,
        "rows": results.values,
        "notes": {row.name: row.note for row in table.rows.values() if row.note},
        "missing": results.missing,
        "failed": failed,
        "stages": results.stages,
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def results_markdown(
    table: Table,
    results: Results,
    rows: list[dict[str, Any]],
    failed: Mapping[str, Mapping[int, str]],
    provenance: ResultsProvenance,
) -> str:
    """The results as Markdown, for people."""
    parts = [f"# {table.title}", f"**{table.world}**"]
    parts += [table.note] if table.note else []
    for metric in table.metrics.values():
        lines = [_markdown_line(row) for row in rows if row["metric"] == metric.name]
        if lines:
            unit = f" in {metric.unit}" if metric.unit else ""
            columns = list(lines[0])
            parts.append(f"## {metric.name}{unit}, {metric.better} is better")
            parts.append(table_markdown(columns, lines).rstrip())
    parts.append(_ABOUT.format(reference=table.reference))
    parts += _listed("Rows", {row.name: row.note for row in table.rows.values() if row.note})
    parts += _listed("Not measured", results.missing)
    reasons = {f"{row}, seed {seed}": why for row, seeds in failed.items() for seed, why in seeds.items()}
    parts += _listed("Failed", reasons)
    made = {
        "settings": ", ".join(f"{name} {value}" for name, value in table.settings.items()) or "none",
        "command": f"`{provenance.command}`",
        "revision": provenance.revision,
        "device": provenance.device,
        "date": provenance.date,
    }
    parts += _listed("Made with", made)
    return "\n\n".join(parts) + "\n"


def _markdown_line(row: Mapping[str, Any]) -> dict[str, str]:
    ends = "" if math.isnan(row["low"]) else f" [{format_value(row['low'])}, {format_value(row['high'])}]"
    line = {"row": row["title"], "mean": format_value(row["mean"]) + ends, "seeds": str(row["seeds"])}
    line["difference"] = _difference(row)
    if row["paper_metric"]:
        line[f"paper ({row['paper_metric']})"] = format_value(row["paper"])
        line["paper's difference"] = _short(row["paper_difference"])
        line["direction"] = row["direction"]
    return line


def _difference(row: Mapping[str, Any]) -> str:
    """A difference, with its interval where there is one; the reference row's is 0 and needs none."""
    low, high = row["difference_low"], row["difference_high"]
    if low is None or math.isnan(low) or low == high:
        return _short(row["difference"])
    return f"{_short(row['difference'])} [{_short(low)}, {_short(high)}]"


def _short(difference: float | None) -> str:
    """Three digits, with an exponent where it is tiny."""
    return "" if difference is None else f"{difference:.3g}"


def _listed(title: str, lines: Mapping[str, str]) -> list[str]:
    return [f"## {title}", "\n".join(f"- {name}: {text}" for name, text in lines.items())] if lines else []
