"""`luve report`: tables, curves, dashboards, spectra, comparisons and videos on one page."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from luve_lightning.ablations.results import read_results
from luve_lightning.cli import Verb
from luve_lightning.files import write_text
from luve_lightning.machine import package_version, revision_in_words
from luve_lightning.reporting.dashboard import Dashboard
from luve_lightning.reporting.report import PageText, ReportInputs, ResultTable, build_report, result_table
from luve_lightning.reporting.videos import Comparison
from luve_lightning.terminal import Steps, say

VERBS = {
    "report": Verb(
        "Tables",
        "show tables, curves, dashboards, spectra and videos on one page",
        named=("results", "curves", "spectra", "videos"),
    )
}


_COLUMNS = ["*loss*"]


def report(
    output: Path,
    results: dict[str, Path | None] | None = None,
    curves: dict[str, Path | None] | None = None,
    dashboards: dict[str, Dashboard | None] | None = None,
    spectra: dict[str, Path | None] | None = None,
    comparisons: dict[str, Comparison | None] | None = None,
    videos: dict[str, Path | None] | None = None,
    columns: list[str] = _COLUMNS,
    title: str = "LuVe Lightning: report",
    note: str = "",
    limit_mib: float = 20.0,
) -> None:
    """Builds one self-contained HTML page from results, curves, spectra, comparisons and videos.

    The page loads nothing over a network and opens from a file. The paper's numbers stand in columns of their own;
    each table says on what it was measured. Inputs that are missing, unreadable or too large for the page are
    listed on it and printed; the page is built all the same.

    Args:
        output: HTML file of the page.
        results: Tables of `luve ablate`, CSV files by name: --results NAME=FILE.csv, repeated.
        curves: Folders of training runs with Lightning's metrics.csv, by name: --curves NAME=DIR.
        dashboards: Panels of many runs: --config experiments/dashboards/vluer.yaml, repeated.
        spectra: Folders or CSV files written by `luve spectra`, by name: --spectra NAME=DIR.
        comparisons: Pairs of videos by name, each with a, b and optionally labels, frames (their numbers) and
            caption.
        videos: Video files, or folders of them, by name: --videos NAME=PATH.
        columns: Patterns of the columns of metrics.csv to draw.
        title: Title of the page.
        note: Shown at the top: what holds for everything on the page.
        limit_mib: Size limit of the page, in MiB. Comparisons, then videos that would exceed it are left out.
    """
    started, console = time.perf_counter(), Console(emoji=False)
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"output: expected a file that ends in .html, got {output}")
    inputs = ReportInputs(
        results or {}, curves or {}, spectra or {}, comparisons or {}, videos or {}, columns, dashboards or {}
    )
    if inputs.empty:
        raise ValueError(
            "nothing to show: give results, curves, dashboards, spectra, comparisons or videos, "
            "or --config experiments/report/mini.yaml"
        )
    chosen: list[Mapping[str, object]] = [inputs.comparisons, inputs.videos]
    with Steps(console) as steps:
        count = sum(value is not None for by_name in chosen for value in by_name.values())
        steps.begin("comparisons and videos", count)
        made = build_report(inputs, PageText(title, note, _facts()), read_table, limit_mib, steps.advance)
    write_text(output, made.html)
    shown = ", ".join(f"{kind} {count}" for kind, count in made.counts.items())
    lines = [f"{output}: {shown}; {len(made.html.encode()) / 2**20:.2f} of {limit_mib:g} MiB"]
    lines += [f"  left out: {line}" for line in made.left_out]
    lines.append(f"{time.perf_counter() - started:.0f} s")
    say(console, "\n".join(lines))


def read_table(name: str, path: Path) -> ResultTable:
    """An ablation table from its file, as the page shows it."""
    return result_table(name, path, *read_results(path))


def _facts() -> dict[str, str]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision_in_words(),
        "version": f"luve-lightning {package_version()}",
        "python": platform.python_version(),
        "command": shlex.join(["luve", *sys.argv[1:]]),
    }
