"""Ablation tables as `luve ablate` writes them: a CSV line per row and metric, provenance in JSON beside it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from luve_lightning.reporting.provenance import Origin, in_words, of_results

DIRECTIONS = {"same": "same", "opposite": "opposite", "none": "not told apart", "": ""}
BETTER = {"higher": "higher is better", "lower": "lower is better", "": ""}
FAR = 5.0  # times as far as the next: beyond the scale of the little pictures


@dataclass(frozen=True)
class ResultLine:
    """One row's value of one metric.

    Attributes:
        row: name of the row.
        title: title of the row.
        note: note on the row; may be empty.
        seeds: number of seeds.
        mean: mean over them; NaN where there is no value.
        low: lower end of the 95 % interval; NaN for fewer than two seeds.
        high: upper end.
        difference: difference from the table's reference row, paired by seed; 0 for that row itself, NaN where
            there is none.
        difference_low: lower end of its 95 % interval; NaN for fewer than two seeds.
        difference_high: upper end.
        paper: the paper's own value as in the file, not measured here; empty where it has none.
        paper_difference: likewise.
        direction: a key of DIRECTIONS.
    """

    row: str
    title: str
    note: str
    seeds: int
    mean: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float
    paper: str
    paper_difference: str
    direction: str

    def ends(self) -> tuple[float, ...]:
        """The difference and its interval's ends, as far as they are numbers."""
        return tuple(filter(math.isfinite, (self.difference, self.difference_low, self.difference_high)))


@dataclass(frozen=True)
class MetricTable:
    """All rows of one metric.

    Attributes:
        metric: name used here.
        unit: unit; empty for none.
        better: a key of BETTER.
        paper_metric: the paper's column that it corresponds to; empty when there is none.
        lines: rows in the file's order.
    """

    metric: str
    unit: str
    better: str
    paper_metric: str
    lines: tuple[ResultLine, ...]

    @property
    def has_paper(self) -> bool:
        """Whether the paper says anything about it."""
        return any(line.paper or line.paper_difference for line in self.lines)

    @property
    def reference(self) -> str:
        """Title of the row that differences refer to; empty when it cannot be told."""
        rows = [line for line in self.lines if not abs(line.difference) > 0 and not line.direction]
        return rows[0].title if len(rows) == 1 and len(self.lines) > 1 else ""

    def span(self) -> tuple[float, float]:
        """Lowest and highest of the differences, their intervals and 0.

        Rows that reach more than FAR times as far as the next are left out: they would squeeze the others to dots.
        """
        reaches = sorted((line.ends() for line in self.lines), key=_reach)
        while len(reaches) > 1 and _reach(reaches[-1]) > FAR * _reach(reaches[-2]) > 0:
            reaches.pop()
        values = [0.0, *(value for ends in reaches for value in ends)]
        return min(values), max(values)

    def place(self, value: float) -> float | None:
        """Position of a difference on a line from 4 to 116, for the little picture of intervals; None for NaN.

        Differences outside `span` are placed at the end.
        """
        low, high = self.span()
        if not math.isfinite(value):
            return None
        return round(4 + 112 * ((min(max(value, low), high) - low) / (high - low) if high > low else 0.5), 1)

    def beyond(self, value: float) -> int:
        """-1 for a difference below `span`, 1 for one above, 0 for one inside."""
        low, high = self.span()
        return int(value > high) - int(value < low)


@dataclass(frozen=True)
class ResultTable:
    """One ablation table.

    Attributes:
        name: name in the configuration.
        title: what it compares.
        metrics: metrics, those with a counterpart in the paper first.
        world: sentence on what it was measured on; empty when nothing says so.
        notes: notes on the table as a whole, on metrics without a value and on failed rows.
        provenance: None without a JSON file.
    """

    name: str
    title: str
    metrics: tuple[MetricTable, ...]
    world: str
    notes: tuple[str, ...]
    provenance: Origin | None

    def directions(self) -> dict[str, int]:
        """How many of the differences that the paper also gives point in each direction."""
        counts = Counter(line.direction for metric in self.metrics for line in metric.lines if line.direction)
        return {name: counts[name] for name in ("same", "opposite", "none") if counts[name]}


def result_table(
    name: str, path: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> ResultTable:
    """A table as the page shows it.

    Args:
        name: name in the configuration.
        path: path of the file.
        rows: rows from `luve_lightning.ablations.results.read_results`.
        about: its content of the JSON file beside it; empty without one.
    """
    notes = about.get("notes")
    return ResultTable(
        name,
        str(about.get("title") or rows[0]["table"] or name),
        _by_metric(rows, notes if isinstance(notes, dict) else {}),
        str(about.get("world") or ""),
        tuple(_notes(about)),
        of_results(f"results.{name}", path.with_suffix(".json"), about) if about else None,
    )


def _reach(ends: tuple[float, ...]) -> float:
    return max(map(abs, ends), default=0.0)


def _notes(content: Mapping[str, Any]) -> Iterator[str]:
    if content.get("note"):
        yield in_words(content["note"])
    missing, failed = content.get("missing"), content.get("failed")
    if isinstance(missing, dict):
        yield from (f"Not measured: {metric}: {in_words(reason)}" for metric, reason in missing.items())
    if isinstance(failed, dict):
        yield from (f"Failed: {row}: {in_words(reasons)}" for row, reasons in failed.items())


def _by_metric(rows: Sequence[Mapping[str, Any]], notes: Mapping[str, Any]) -> tuple[MetricTable, ...]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["metric"], []).append(row)
    tables = [
        MetricTable(
            metric,
            lines[0]["unit"],
            lines[0]["better"],
            next((line["paper_metric"] for line in lines if line["paper_metric"]), ""),
            tuple(_line(line, notes) for line in lines),
        )
        for metric, lines in groups.items()
    ]
    return tuple(sorted(tables, key=lambda table: not table.has_paper))


def _line(row: Mapping[str, Any], notes: Mapping[str, Any]) -> ResultLine:
    known = {field.name: row[field.name] for field in fields(ResultLine) if field.name in row}
    title, note = row["title"] or row["row"], in_words(notes.get(row["row"], ""))
    return ResultLine(**known | {"title": title, "note": note})
