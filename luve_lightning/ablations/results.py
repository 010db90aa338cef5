"""Means over seeds with their intervals, and whether a difference has the paper's direction."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from luve_lightning.ablations.graph import AblationPlanner, Plan
from luve_lightning.ablations.stage_process import done_record, is_done
from luve_lightning.ablations.table import ROW, Better, MetricSpec, Table

LEVEL = 0.95

Direction = Literal["same", "opposite", "none", ""]


@dataclass(frozen=True)
class SeedInterval:
    """A mean over seeds with its 95 % interval.

    Attributes:
        mean: mean over the seeds.
        low: lower end; NaN for fewer than two seeds, which say nothing about the spread.
        high: upper end.
        seeds: how many.
    """

    mean: float
    low: float
    high: float
    seeds: int


def t_interval(values: Sequence[float]) -> SeedInterval:
    """The mean and mean ± t s / sqrt(n); t is the 97.5th percentile of Student's distribution with n - 1 degrees.

    Args:
        values: one per seed, at least one, finite.

    Raises:
        ValueError: none, or one that is not finite.
    """
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"expected at least one finite number, got {list(values)}")
    from scipy.stats import t

    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return SeedInterval(mean, math.nan, math.nan, count)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * spread / math.sqrt(count)
    return SeedInterval(mean, mean - half, mean + half, count)


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> SeedInterval | None:
    """The interval of `values - others` over the seeds that both have; None when they share none."""
    common = sorted(values.keys() & others.keys())
    return t_interval([values[seed] - others[seed] for seed in common]) if common else None


def direction(
    difference: SeedInterval | None,
    paper_difference: float | None,
    better: Better,
    paper_better: Better,
) -> Direction:
    """Whether a difference from the reference row goes the paper's way.

    Args:
        difference: difference of the row.
        paper_difference: difference between the paper's values.
        better: which direction of ours is better.
        paper_better: which direction of the paper's is better.

    Returns:
        "same" or "opposite", in the sense of better and worse; "none" when the interval contains 0 or there is
        none (one seed); "" when there is nothing to compare with.
    """
    if difference is None or paper_difference is None or paper_difference == 0:
        return ""
    if not (difference.low > 0 or difference.high < 0):
        return "none"
    ours = (difference.mean > 0) == (better == "higher")
    papers = (paper_difference > 0) == (paper_better == "higher")
    return "same" if ours == papers else "opposite"


REPORT = "table.json"  # what `luve evaluate --output {out}/table.csv` writes beside it

COLUMNS = (
    "table", "row", "title", "metric", "unit", "better", "seeds", "mean", "low", "high", "paper", "paper_metric",
    "difference", "difference_low", "difference_high", "paper_difference", "direction",
)  # fmt: skip

Values = dict[str, dict[int, dict[str, float]]]


@dataclass
class Results:
    """What is known of a table.

    Attributes:
        values: values by row, seed and metric.
        missing: metrics without a value, with the reason.
        stages: all finished stages: name, hash, seconds, row, seed, revision.
    """

    values: Values = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)


def finished_rows(planner: AblationPlanner, rows: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
    """The rows of each seed whose own stages are all done; what serves all rows may be missing."""
    return {
        seed: [row for row in names if all(map(is_done, planner.before_gathering(row, seed)))]
        for seed, names in rows.items()
    }


def collect(planner: AblationPlanner, rows: Mapping[int, Sequence[str]]) -> Results:
    """Read every value of some rows that exists, from the evaluations of exactly those that are finished."""
    results = Results()
    plan = planner.plan(finished_rows(planner, rows))
    reports: dict[str, dict[str, Any] | None] = {}
    for (row, seed, name), digest in plan.goals.items():
        stage = plan.stages[digest]
        if digest not in reports:
            done = is_done(stage)
            reports[digest] = json.loads((stage.folder / REPORT).read_text()) if done else None
        report = reports[digest]
        if report is None:
            continue
        for metric in planner.table.metrics.values():
            if metric.stage == name:
                _take(results, metric, row, seed, report)
    results.stages = _stage_records(plan)
    return results


def _take(results: Results, metric: MetricSpec, row: str, seed: int, report: Mapping[str, Any]) -> None:
    method = metric.method.replace(ROW, row)
    cell = report["methods"].get(method, {}).get("metrics", {}).get(metric.column)
    value = None if cell is None else cell["value"]
    if isinstance(value, int | float) and math.isfinite(value):
        results.values.setdefault(row, {}).setdefault(seed, {})[metric.name] = float(value)
    else:
        reason = report.get("not_run", {}).get(metric.column)
        results.missing.setdefault(
            metric.name, reason or f"{method}: the evaluation gives no {metric.column}"
        )


def _stage_records(plan: Plan) -> list[dict[str, Any]]:
    """One record per finished stage; row and seed are null where it serves several."""
    records = []
    for stage in plan.stages.values():
        done = done_record(stage)
        if done is not None:
            rows, seeds = {row for row, _ in stage.uses}, {seed for _, seed in stage.uses}
            record: dict[str, Any] = {
                "name": stage.name,
                "hash": stage.digest,
                "seconds": done.get("seconds"),
            }
            record["row"] = rows.pop() if len(rows) == 1 else None
            record["seed"] = seeds.pop() if len(seeds) == 1 else None
            records.append(record | {"revision": done.get("revision")})
    return records


def result_rows(table: Table, values: Values) -> list[dict[str, Any]]:
    """The table: one line per row and metric, with the keys `COLUMNS`; None where there is nothing to say.

    Rows without any value are left out.
    """
    lines = []
    for row in table.rows.values():
        for metric in table.metrics.values():
            own = _by_seed(values, row.name, metric.name)
            if own:
                lines.append(_line(table, values, row.name, metric, own))
    return lines


def _line(
    table: Table, values: Values, name: str, metric: MetricSpec, own: dict[int, float]
) -> dict[str, Any]:
    row, reference = table.rows[name], table.rows[table.reference]
    mean = t_interval(list(own.values()))
    difference = paired(own, _by_seed(values, reference.name, metric.name))
    paper = row.paper.get(metric.paper) if metric.paper else None
    base = reference.paper.get(metric.paper) if metric.paper else None
    paper_difference = None if paper is None or base is None else round(paper - base, 6)
    return {
        "table": table.name,
        "row": name,
        "title": row.title,
        "metric": metric.name,
        "unit": metric.unit,
        "better": metric.better,
        "seeds": mean.seeds,
        "mean": mean.mean,
        "low": mean.low,
        "high": mean.high,
        "paper": paper,
        "paper_metric": metric.paper or "",
        "difference": None if difference is None else difference.mean,
        "difference_low": None if difference is None else difference.low,
        "difference_high": None if difference is None else difference.high,
        "paper_difference": paper_difference,
        "direction": direction(difference, paper_difference, metric.better, metric.paper_better),
    }


def _by_seed(values: Values, row: str, metric: str) -> dict[int, float]:
    return {seed: found[metric] for seed, found in sorted(values.get(row, {}).items()) if metric in found}
