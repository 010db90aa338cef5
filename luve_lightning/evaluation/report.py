"""The report of an evaluation: its tables, what is missing from them, and both as files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from luve_lightning.evaluation.bootstrap import Interval
from luve_lightning.evaluation.prepared_metrics import ReadyMetric
from luve_lightning.evaluation.runner import ORIGINALS, Measurements, Problem
from luve_lightning.evaluation.summary import Resampling, Summary
from luve_lightning.evaluation.tables import booktabs, escape, format_value, table_csv, table_markdown
from luve_lightning.evaluation.video_sets import VideoSets
from luve_lightning.files import write_text

NOTES = (
    "Each cell is a value and its 95 % interval, a percentile bootstrap over videos. For Fréchet distances the "
    "percentiles of the resampled distances are shifted by the difference of the sample's distance and the "
    "resamples' mean, because a resample holds fewer different videos and so lies farther away; the bias of the "
    "sample itself stays, so compare distances of equally many videos only. Where the originals are the reference "
    "they are drawn along with the videos. Differences are of the videos that both methods have, resampled together."
)

FEW = 10  # number of videos below which a bootstrap's intervals are far too narrow


@dataclass(frozen=True)
class EvaluationReport:
    """Everything that is written about an evaluation.

    Attributes:
        sets: the videos.
        found: results of each video.
        summary: the table.
        resampling: how intervals are made.
        facts: provenance by name.
    """

    sets: VideoSets
    found: Measurements
    summary: Summary
    resampling: Resampling
    facts: Mapping[str, str]

    @property
    def metrics(self) -> list[ReadyMetric]:
        """The columns."""
        return self.summary.metrics

    @property
    def unreadable(self) -> list[Problem]:
        """Videos that could not be read."""
        return [problem for problem in self.found.problems if problem.metric is None]

    @property
    def unmeasured(self) -> list[Problem]:
        """Single results that are missing."""
        return [p for p in self.found.problems if p.metric is not None] + self.summary.problems

    def interval(self, metric: str, method: str) -> Interval:
        """A cell; NaN where there is nothing."""
        nothing = Interval(math.nan, math.nan, math.nan, 0)
        return self.summary.intervals.get(metric, {}).get(method, nothing)

    def videos(self, method: str) -> int:
        """Readable videos of a method."""
        bad = {problem.video for problem in self.unreadable if problem.method == method}
        return len(self.sets.methods[method].keys() - bad)

    def versions(self) -> dict[str, str]:
        """Versions of every package used for any result, including cached results."""
        by_method = (scores for methods in self.found.scores.values() for scores in methods.values())
        used = [score.versions for scores in by_method for score in scores.values()]
        seen: dict[str, set[str]] = {}
        for versions in [*used, self.found.versions]:
            for package, version in versions.items():
                seen.setdefault(package, set()).add(version)
        return {package: " and ".join(sorted(versions)) for package, versions in seen.items()}


def table_rows(report: EvaluationReport) -> tuple[list[str], list[dict[str, Any]]]:
    """The main table: columns, and one row per method."""
    names = [metric.name for metric in report.metrics]
    versions = settings(report)["versions"]
    extractors = "; ".join(f"{m.name}: {m.extractor}" for m in report.metrics if m.extractor)
    columns = ["method", "n"]
    columns += [column for name in names for column in (name, f"{name}_low", f"{name}_high")]
    columns += ["seed", "extractor", "versions"]
    rows = []
    for method in report.sets.methods:
        row: dict[str, Any] = {"method": method, "n": report.videos(method)}
        for name in names:
            cell = report.interval(name, method)
            row |= {name: cell.value, f"{name}_low": cell.low, f"{name}_high": cell.high}
        rows.append(row | {"seed": report.resampling.seed, "extractor": extractors, "versions": versions})
    return columns, rows


def video_rows(report: EvaluationReport) -> tuple[list[str], list[dict[str, Any]]]:
    """Every video of every method with its scores; distances between sets have none."""
    names = [metric.name for metric in report.found.metrics if metric.frechet is None]
    rows = []
    for method, files in report.sets.methods.items():
        for video in sorted(files):
            row: dict[str, Any] = {"method": method, "video": video, "prompt": report.sets.prompts.get(video, "")}
            for name in names:
                score = report.found.scores.get(name, {}).get(method, {}).get(video)
                row[name] = None if score is None else score.value
            rows.append(row)
    return ["method", "video", "prompt", *names], rows


def difference_rows(report: EvaluationReport) -> tuple[list[str], list[dict[str, Any]]]:
    """Every pair and metric."""
    columns = ["metric", "first", "second", "difference", "low", "high", "n"]
    rows = [
        dict(zip(columns, (d.metric, d.first, d.second, *astuple(d.interval)), strict=True))
        for d in report.summary.differences
    ]
    return columns, rows


def with_arrow(metric: ReadyMetric) -> str:
    """A column's name with an arrow towards better."""
    arrow = {True: " ↑", False: " ↓", None: ""}[metric.higher_is_better]
    return f"{metric.name}{arrow}"


def in_words(interval: Interval) -> str:
    """A value and its interval."""
    if math.isnan(interval.value):
        return ""
    if math.isnan(interval.low):
        return format_value(interval.value)
    return f"{format_value(interval.value)} [{format_value(interval.low)}, {format_value(interval.high)}]"


def report_markdown(report: EvaluationReport) -> str:
    """The report as Markdown, for people."""
    columns = ["method", "n", *(with_arrow(metric) for metric in report.metrics)]
    rows = []
    for method in report.sets.methods:
        cells = [in_words(report.interval(metric.name, method)) for metric in report.metrics]
        rows.append(dict(zip(columns, [method, report.videos(method), *cells], strict=True)))
    parts = ["# Evaluation", table_markdown(columns, rows).rstrip(), *warnings(report), NOTES]
    if report.summary.differences:
        parts += ["## Differences", table_markdown(*difference_rows(report)).rstrip()]
    parts += _listed("Metrics", [about(metric) for metric in report.metrics])
    parts += _listed("Not run", [str(skipped) for skipped in report.found.skipped])
    parts += _listed("Unreadable", problem_lines(report.unreadable))
    parts += _listed("Not measured", problem_lines(report.unmeasured))
    parts += _listed("Missing", missing_lines(report.sets))
    facts = {**report.facts, **settings(report)}
    parts += _listed("Made with", [f"{name}: {value}" for name, value in facts.items()])
    return "\n\n".join(parts) + "\n"


def about(metric: ReadyMetric) -> str:
    """A metric in one line."""
    network = f"; features of {metric.extractor}" if metric.extractor else ""
    return f"{with_arrow(metric)}: measured at {metric.resolution}{network}"


def settings(report: EvaluationReport) -> dict[str, str]:
    """Everything else that the numbers depend on, by name."""
    resampling = report.resampling
    return {
        "seed": str(resampling.seed),
        "bootstrap": f"{resampling.replicates} resamples, {resampling.frechet_replicates} for Fréchet distances",
        "versions": ", ".join(f"{package} {version}" for package, version in report.versions().items()),
    }


def _listed(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "\n".join(f"- {line}" for line in lines)] if lines else []


def problem_lines(problems: Sequence[Problem]) -> list[str]:
    """Each problem in one line."""
    return [f"{p.method or ORIGINALS}, {p.video}{f', {p.metric}' if p.metric else ''}: {p.reason}" for p in problems]


def warnings(report: EvaluationReport) -> list[str]:
    """What limits trust in the numbers: few videos, or different ones."""
    counts = {method: report.videos(method) for method in report.sets.methods}
    told = []
    if min(counts.values()) < FEW:
        told.append(f"Of fewer than {FEW} videos, intervals are far too narrow to support a conclusion.")
    if len(set(counts.values())) > 1:
        told.append(
            "The methods have different numbers of readable videos: compare them by the differences, which are of the "
            "videos that both have."
        )
    return told


def missing_lines(sets: VideoSets) -> list[str]:
    """Which methods lack videos that others have."""
    return [
        f"{method} lacks {len(names)} of the others' videos: {', '.join(names[:5])}{', ...' * (len(names) > 5)}"
        for method, names in sets.missing().items()
    ]


def write_report(report: EvaluationReport, path: Path) -> list[Path]:
    """Write the table beside `path` as .csv, .md, .json and .tex, and the CSVs of videos and differences.

    Returns:
        The written files.
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
        return {name: _number(value) for name, value in asdict(interval).items()}

    methods = {
        method: {
            "n": report.videos(method),
            "metrics": {m.name: numbers(report.interval(m.name, method)) for m in report.metrics},
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
            for m in report.metrics
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
    best = {m.name: _best(report, m) for m in report.metrics}
    header = ["Method", "$n$"]
    for metric in report.metrics:
        arrow = {True: r" $\uparrow$", False: r" $\downarrow$", None: ""}[metric.higher_is_better]
        header.append(escape(metric.name) + arrow)
    rows = []
    for method in report.sets.methods:
        cells = [escape(method), str(report.videos(method))]
        for m in report.metrics:
            interval = report.interval(m.name, method)
            value, _, ends = in_words(interval).partition(" ")
            value = rf"\textbf{{{value}}}" if interval.value == best[m.name] else value
            cells.append(value + (rf" {{\scriptsize {ends}}}" if ends else ""))
        rows.append(cells)
    notes = [f"{name}: {value}" for name, value in {**report.facts, **settings(report)}.items()]
    return booktabs(header, rows, [*notes, *(about(m) for m in report.metrics), NOTES])


def _best(report: EvaluationReport, metric: ReadyMetric) -> float | None:
    values = [report.interval(metric.name, method).value for method in report.sets.methods]
    values = [value for value in values if not math.isnan(value)]
    if metric.higher_is_better is None or not values:
        return None
    return max(values) if metric.higher_is_better else min(values)
