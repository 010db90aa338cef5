"""The report page: reads the inputs, keeps within the size, renders; and ablation tables as it shows them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from luve_lightning.evaluation.tables import format_value
from luve_lightning.reporting.dashboard import Dashboard, read_dashboard
from luve_lightning.reporting.page import Inputs, LeftOut, Origin, in_words, of_results, render_document
from luve_lightning.reporting.plots import read_curves, read_spectra
from luve_lightning.reporting.videos import (
    ComparedFrames,
    Comparison,
    PageVideo,
    read_comparison,
    read_sample,
    sample_files,
)

MIB = 2**20
_MARKUP = 2000  # characters around a comparison's or a video's own, approximately
# The page's content, in order.
KINDS = ("tables", "curves", "dashboards", "spectra", "comparisons", "videos")


@dataclass(frozen=True)
class ReportInputs:
    """What the page shows; each by name, null ones are skipped.

    Attributes:
        results: CSV files of ablation tables.
        curves: folders of training runs.
        spectra: folders or CSV files from `luve spectra`.
        comparisons: pairs of videos.
        videos: video files, or folders of them.
        columns: which columns of a run's metrics to draw.
        dashboards: panels that compare runs.
    """

    results: Mapping[str, Path | None] = field(default_factory=dict)
    curves: Mapping[str, Path | None] = field(default_factory=dict)
    spectra: Mapping[str, Path | None] = field(default_factory=dict)
    comparisons: Mapping[str, Comparison | None] = field(default_factory=dict)
    videos: Mapping[str, Path | None] = field(default_factory=dict)
    columns: Sequence[str] = ("*loss*",)
    dashboards: Mapping[str, Dashboard | None] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether nothing at all is requested; what is requested may still be missing."""
        kinds: tuple[Mapping[str, object], ...] = (
            self.results, self.curves, self.dashboards, self.spectra, self.comparisons, self.videos
        )  # fmt: skip
        return all(value is None for kind in kinds for value in kind.values())


@dataclass(frozen=True)
class PageText:
    """The page's text about itself.

    Attributes:
        title: heading.
        note: text at its top, about everything on it; may be empty.
        facts: how it was made, by name: date, revision, version, command.
    """

    title: str
    note: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportPage:
    """A finished page.

    Attributes:
        html: the page.
        counts: number of tables, curves, dashboards, spectra, comparisons and videos.
        left_out: inputs that it does not show, or not all of, with reasons.
    """

    html: str
    counts: dict[str, int]
    left_out: tuple[LeftOut, ...]


def build_report(
    inputs: ReportInputs,
    text: PageText,
    read_table: Callable[[str, Path], ResultTable],
    limit_mib: float = 20.0,
    advance: Callable[[], None] = lambda: None,
) -> ReportPage:
    """Read the inputs and render the page. Inputs that are missing, unreadable or too large are listed on it.

    Args:
        inputs: what to show.
        text: what the page says about itself.
        read_table: reads an ablation table, given its name and file.
        limit_mib: size limit of the page; comparisons, then videos that would exceed it are left out. Tables and
            charts never are.
        advance: called after each comparison and each video.

    Raises:
        ValueError: a limit that tables and charts alone exceed.
    """
    if not limit_mib > 0:
        raise ValueError(f"limit_mib: expected a number > 0, got {limit_mib}")
    read = Inputs()
    parts: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    parts["tables"] = read.read("results", inputs.results, read_table)
    parts["curves"] = read.read("curves", inputs.curves, partial(read_curves, columns=inputs.columns))
    parts["dashboards"] = read.read("dashboards", inputs.dashboards, lambda _, board: read_dashboard(board),
                                    lambda board: ", ".join(board.folders))  # fmt: skip
    parts["spectra"] = read.read("spectra", inputs.spectra, read_spectra)
    for table in parts["tables"]:
        if table.provenance is None:
            read.note(f"results.{table.name}", inputs.results[table.name],
                      "no JSON file beside it, so nothing says where its numbers come from")  # fmt: skip
    size, limit = len(_render(parts, read.left_out, text).encode()), int(limit_mib * MIB)
    if size > limit:
        raise ValueError(
            f"limit_mib: {limit_mib:g}: the tables and charts alone are {size / MIB:.2f} MiB; expected a larger limit"
        )
    for kind, key, path, reader in _media(inputs, read, advance):
        part = read.attempt(key, path, reader)
        if part is not None and size + part.characters + _MARKUP <= limit:
            parts[kind].append(part)
            size += part.characters + _MARKUP
        elif part is not None:
            left = max(0.0, (limit - size) / MIB)
            reason = f"{part.characters / MIB:.2f} MiB, {left:.2f} of limit_mib {limit_mib:g} are left"
            read.note(key, path, f"too large: {reason}")
    html = _render(parts, read.left_out, text)
    # Long captions and long lists of missing inputs were not counted.
    while len(html.encode()) > limit_mib * MIB and (parts["videos"] or parts["comparisons"]):
        kind = "videos" if parts["videos"] else "comparisons"
        read.note(kind, parts[kind].pop().name, f"too large: limit_mib {limit_mib:g} is used up")
        html = _render(parts, read.left_out, text)
    return ReportPage(html, {kind: len(found) for kind, found in parts.items()}, tuple(read.left_out))


def _media(
    inputs: ReportInputs, read: Inputs, advance: Callable[[], None]
) -> Iterator[tuple[str, str, Path, Callable[[], ComparedFrames | PageVideo]]]:
    """Kind, key, path and reader of every comparison and video."""
    for name, comparison in inputs.comparisons.items():
        if comparison is not None:
            key = f"comparisons.{name}"
            yield "comparisons", key, comparison.a, partial(read_comparison, name, comparison)
            advance()
    for name, path in inputs.videos.items():
        if path is not None:
            key, files = f"videos.{name}", partial(sample_files, name, path)
            for title, file in read.attempt(key, path, files) or ():
                yield "videos", key, file, partial(read_sample, title, file)
            advance()


def _render(parts: Mapping[str, list[Any]], left_out: Sequence[LeftOut], text: PageText) -> str:
    measured = [part.provenance for kind in ("tables", "curves", "spectra") for part in parts[kind]]
    context = {
        "text": text,
        "parts": parts,
        "origins": [origin for origin in measured if origin is not None],
        "left_out": left_out,
        "directions": DIRECTIONS,
        "better": BETTER,
        "number": format_value,
    }
    styles, scripts = ("base.css", "report.css", "compare.css"), ("sort.js", "compare.js")
    return render_document("report.html", styles, scripts, context)


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
        lines = sorted((max(map(abs, line.ends()), default=0.0), line.ends()) for line in self.lines)
        while len(lines) > 1 and lines[-1][0] > FAR * lines[-2][0] > 0:
            lines.pop()
        values = [0.0, *(value for _, ends in lines for value in ends)]
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


def result_table(name: str, path: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> ResultTable:
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
