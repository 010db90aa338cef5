"""The report page: reads the inputs, keeps within the size, renders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from luve_lightning.evaluation.tables import format_value
from luve_lightning.reporting.dashboard import Dashboard, read_dashboard
from luve_lightning.reporting.page import render_document
from luve_lightning.reporting.plots import read_curves, read_spectra
from luve_lightning.reporting.provenance import Inputs, LeftOut
from luve_lightning.reporting.result_tables import BETTER, DIRECTIONS, ResultTable
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
        text: text about the page itself.
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
