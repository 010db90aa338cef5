"""An evaluation's report as files: CSV, Markdown, JSON and LaTeX."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from luve_lightning.evaluation.bootstrap import Interval
from luve_lightning.evaluation.evaluation_report import (
    NOTES,
    EvaluationReport,
    about,
    difference_rows,
    in_words,
    report_markdown,
    settings,
    table_rows,
    video_rows,
)
from luve_lightning.evaluation.measures import Measure
from luve_lightning.evaluation.runner import ORIGINALS, Problem
from luve_lightning.evaluation.tables import booktabs, escape, table_csv
from luve_lightning.files import write_text


def write_report(report: EvaluationReport, path: Path) -> list[Path]:
    """Write the table beside `path` as .csv, .md, .json and .tex, and the CSVs of videos and differences.

    Returns:
        The files.
    """
    files = {
        path: table_csv(*table_rows(report)),
        path.with_stem(f"{path.stem}-videos"): table_csv(*video_rows(report)),
    }
    if report.summary.differences:
        files[path.with_stem(f"{path.stem}-differences")] = table_csv(*difference_rows(report))
    files[path.with_suffix(".md")] = report_markdown(report)
    files[path.with_suffix(".json")] = report_json(report)
    files[path.with_suffix(".tex")] = report_latex(report)
    for file, text in files.items():
        write_text(file, text)
    return list(files)


def report_json(report: EvaluationReport) -> str:
    """The report for programs; NaN is null, infinities are the strings "inf" and "-inf"."""

    def numbers(interval: Interval) -> dict[str, Any]:
        value, low, high = (_number(x) for x in (interval.value, interval.low, interval.high))
        return {"value": value, "low": low, "high": high, "n": interval.n}

    methods = {
        method: {
            "n": report.videos(method),
            "metrics": {m.name: numbers(report.interval(m.name, method)) for m in report.measures},
        }
        for method in report.sets.methods
    }
    content = {
        "methods": methods,
        "differences": [
            {"metric": d.metric, "first": d.first, "second": d.second} | numbers(d.interval)
            for d in report.summary.differences
        ],
        "metrics": {
            m.name: {
                "higher_is_better": m.higher_is_better,
                "resolution": m.resolution,
                "extractor": m.extractor,
                "identity": m.identity,
            }
            for m in report.measures
        },
        "not_run": {skipped.name: skipped.reason for skipped in report.found.skipped},
        "unreadable": [_problem(p) for p in report.unreadable],
        "not_measured": [_problem(p) for p in report.unmeasured],
        "missing": report.sets.missing(),
        "without_original": report.sets.without_original(),
        "seed": report.resampling.seed,
        "replicates": report.resampling.replicates,
        "frechet_replicates": report.resampling.frechet_replicates,
        "interval": "95 % percentile bootstrap over videos; of Fréchet distances shifted to the sample's value",
        "versions": report.versions(),
        "made_with": dict(report.facts),
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _number(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else str(value)


def _problem(problem: Problem) -> dict[str, str | None]:
    return {
        "method": problem.method or ORIGINALS,
        "video": problem.video,
        "metric": problem.metric,
        "reason": problem.reason,
    }


def report_latex(report: EvaluationReport) -> str:
    """The main table with the best value of each column bold."""
    best = {m.name: _best(report, m) for m in report.measures}
    header = ["Method", "$n$"]
    for measure in report.measures:
        arrow = {True: r" $\uparrow$", False: r" $\downarrow$", None: ""}[measure.higher_is_better]
        header.append(escape(measure.name) + arrow)
    rows = []
    for method in report.sets.methods:
        cells = [escape(method), str(report.videos(method))]
        for m in report.measures:
            interval = report.interval(m.name, method)
            value, _, ends = in_words(interval).partition(" ")
            value = rf"\textbf{{{value}}}" if interval.value == best[m.name] else value
            cells.append(value + (rf" {{\scriptsize {ends}}}" if ends else ""))
        rows.append(cells)
    notes = [f"{name}: {value}" for name, value in {**report.facts, **settings(report)}.items()]
    return booktabs(header, rows, [*notes, *(about(m) for m in report.measures), NOTES])


def _best(report: EvaluationReport, measure: Measure) -> float | None:
    values = [report.interval(measure.name, method).value for method in report.sets.methods]
    values = [value for value in values if not math.isnan(value)]
    if measure.higher_is_better is None or not values:
        return None
    return max(values) if measure.higher_is_better else min(values)
