"""The report page: reads the inputs, keeps within the size, renders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from luve_lightning.evaluation.tables import format_value
from luve_lightning.reporting.dashboard import Dashboard, DrawnDashboard, read_dashboard
from luve_lightning.reporting.document import render_document
from luve_lightning.reporting.plots import RunCurves, SpectraPlots, read_curves, read_spectra
from luve_lightning.reporting.provenance import Inputs, LeftOut, Origin
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
_MARKUP = 2000  # characters around a comparison's or a video's own, about


class _Sized(Protocol):
    @property
    def characters(self) -> int: ...


Media = TypeVar("Media", bound=_Sized)


@dataclass(frozen=True)
class ReportInputs:
    """What the page is to show; each by its name, null ones are passed over.

    Attributes:
        results: CSV files of ablation tables.
        curves: folders of training runs.
        spectra: folders or CSV files of `luve spectra`.
        comparisons: pairs of videos.
        videos: video files, or folders of them.
        columns: which columns of a run's metrics are drawn.
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
        """Whether nothing at all is asked for; what is asked for may still be missing."""
        kinds: tuple[Mapping[str, object], ...] = (
            self.results, self.curves, self.dashboards, self.spectra, self.comparisons, self.videos
        )  # fmt: skip
        return all(value is None for kind in kinds for value in kind.values())


@dataclass(frozen=True)
class PageText:
    """What the page says of itself.

    Attributes:
        title: its heading.
        note: at its top, what holds for everything on it; may be empty.
        facts: how it was made, by name: date, revision, version, command.
    """

    title: str
    note: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass
class PageParts:
    """What could be read."""

    tables: list[ResultTable]
    curves: list[RunCurves]
    dashboards: list[DrawnDashboard]
    spectra: list[SpectraPlots]
    comparisons: list[ComparedFrames] = field(default_factory=list)
    videos: list[PageVideo] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """How many of each kind."""
        kinds = ("tables", "curves", "dashboards", "spectra", "comparisons", "videos")
        return {kind: len(getattr(self, kind)) for kind in kinds}

    def provenance(self) -> list[Origin]:
        """Of those that have one."""
        every = [part.provenance for kind in (self.tables, self.curves, self.spectra) for part in kind]
        return [found for found in every if found is not None]


@dataclass(frozen=True)
class ReportPage:
    """A finished page.

    Attributes:
        html: the page.
        counts: how many tables, curves, dashboards, spectra, comparisons and videos it shows.
        left_out: the inputs that it does not show, or not all of, and why.
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
        text: of the page itself.
        read_table: reads an ablation table, given its name and file.
        limit_mib: most of the page; comparisons and then videos that would exceed it are left out. Tables and charts
            never are.
        advance: called after each comparison and each video.

    Raises:
        ValueError: a limit that tables and charts alone exceed.
    """
    if not limit_mib > 0:
        raise ValueError(f"limit_mib: expected a number > 0, got {limit_mib}")
    read = Inputs()
    parts = PageParts(
        read.read("results", inputs.results, read_table),
        read.read("curves", inputs.curves, lambda name, path: read_curves(name, path, inputs.columns)),
        _read_dashboards(inputs, read),
        read.read("spectra", inputs.spectra, read_spectra),
    )
    for table in parts.tables:
        if table.provenance is None:
            read.note(f"results.{table.name}", str(inputs.results[table.name]),
                      "no JSON file beside it, so nothing says where its numbers come from")  # fmt: skip
    size = len(_render(parts, read.left_out, text).encode())
    if size > limit_mib * MIB:
        raise ValueError(
            f"limit_mib: {limit_mib:g}: the tables and charts alone are {size / MIB:.2f} MiB; expected a larger limit"
        )
    budget = _Budget(int(limit_mib * MIB) - size, limit_mib)
    _add_comparisons(parts, inputs, read, budget, advance)
    _add_videos(parts, inputs, read, budget, advance)
    html = _render(parts, read.left_out, text)
    # Long captions and long lists of what was left out were not reckoned with.
    while len(html.encode()) > limit_mib * MIB and (parts.videos or parts.comparisons):
        last = (parts.videos or parts.comparisons).pop()
        read.note(type(last).__name__, last.name, f"too large: limit_mib {limit_mib:g} is used up")
        html = _render(parts, read.left_out, text)
    return ReportPage(html, parts.counts(), tuple(read.left_out))


def _read_dashboards(inputs: ReportInputs, read: Inputs) -> list[DrawnDashboard]:
    """The dashboards that have runs, those without noted."""
    found = []
    for name, dashboard in inputs.dashboards.items():
        if dashboard is not None:
            where = Path(", ".join(dashboard.folders))
            drawn = read.attempt(f"dashboards.{name}", where, lambda board=dashboard: read_dashboard(board))  # type: ignore[misc]
            found += [] if drawn is None else [drawn]
    return found


class _Budget:
    """What is left of the page's size."""

    def __init__(self, characters: int, limit_mib: float) -> None:
        self.left, self.limit_mib = characters, limit_mib

    def keep(self, part: Media | None, key: str, path: Path | str, read: Inputs) -> Media | None:
        """The part if it fits, or None after noting that it does not."""
        if part is None or part.characters + _MARKUP <= self.left:
            self.left -= 0 if part is None else part.characters + _MARKUP
            return part
        size, left = part.characters / MIB, max(0.0, self.left / MIB)
        reason = f"too large: {size:.2f} MiB, {left:.2f} of limit_mib {self.limit_mib:g} are left"
        read.note(key, path, reason)
        return None


def _add_comparisons(
    parts: PageParts, inputs: ReportInputs, read: Inputs, budget: _Budget, advance: Callable[[], None]
) -> None:
    for name, comparison in inputs.comparisons.items():
        if comparison is None:
            continue
        key, path = f"comparisons.{name}", comparison.a
        found = read.attempt(key, path, lambda name=name, c=comparison: read_comparison(name, c))  # type: ignore[misc]
        kept = budget.keep(found, key, path, read)
        if kept is not None:
            parts.comparisons.append(kept)
        advance()


def _add_videos(
    parts: PageParts, inputs: ReportInputs, read: Inputs, budget: _Budget, advance: Callable[[], None]
) -> None:
    for name, path in inputs.videos.items():
        if path is None:
            continue
        key = f"videos.{name}"
        files = read.attempt(key, path, lambda name=name, path=path: list(sample_files(name, path)))  # type: ignore[misc]
        for title, file in files or ():
            found = read.attempt(key, file, lambda title=title, file=file: read_sample(title, file))  # type: ignore[misc]
            kept = budget.keep(found, key, file, read)
            if kept is not None:
                parts.videos.append(kept)
        advance()


def _render(parts: PageParts, left_out: Sequence[LeftOut], text: PageText) -> str:
    context: dict[str, Any] = {
        "text": text,
        "parts": parts,
        "left_out": left_out,
        "directions": DIRECTIONS,
        "better": BETTER,
        "number": format_value,
    }
    return render_document(
        "luve_lightning.reporting",
        "report.html",
        ("base.css", "report.css", "compare.css"),
        ("sort.js", "compare.js"),
        context,
    )
