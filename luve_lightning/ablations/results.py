"""A table's results: means over seeds, differences and their direction, as CSV, JSON and Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from luve_lightning.ablations.graph import AblationPlanner, AblationStage, Plan
from luve_lightning.ablations.output import holm, p_value, results_markdown, verdict
from luve_lightning.ablations.stage_process import done_record, is_done
from luve_lightning.ablations.table import ROW, Better, MetricSpec, Table
from luve_lightning.evaluation.tables import table_csv
from luve_lightning.files import read_json, write_text

LEVEL, POWER = 0.95, 0.8

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


@cache
def noncentrality(count: int) -> float:
    """How many standard errors a true difference must have for `count` seeds to see it with probability `POWER`.

    Seen means that the interval of `t_interval` does not hold 0: a paired t-test, two-sided at 5 %. Its statistic has
    the noncentral t distribution with `count` - 1 degrees (J. Cohen, Statistical Power Analysis for the Behavioral
    Sciences, 2nd edition 1988, chapter 2), which is solved for its parameter.

    Raises:
        ValueError: for fewer than two seeds, which see nothing.
    """
    if count < 2:
        raise ValueError(f"expected at least two seeds, got {count}")
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    critical = float(t.ppf((1 + LEVEL) / 2, count - 1))

    def missing(parameter: float) -> float:
        # On the other side it would be seen once in ten thousand times, where SciPy's function breaks down.
        return POWER - float(nct.sf(critical, count - 1, parameter))

    return float(brentq(missing, 0.0, 2 * critical + 2))


def detectable(difference: SeedInterval | None) -> float | None:
    """The true difference that as many seeds would see with probability `POWER`: the minimum detectable effect.

    It is `noncentrality` standard errors (H. S. Bloom, Minimum Detectable Effects, Evaluation Review 19, 1995). The
    error is estimated from these seeds. Its own 95 % interval, by chi squared, is 0.6 to 2.9 times it for five seeds
    and 0.7 to 1.8 times for ten.

    Returns:
        A size, >= 0; None where there is no difference or one seed.
    """
    if difference is None or difference.seeds < 2:
        return None
    from scipy.stats import t

    error = (difference.high - difference.mean) / float(t.ppf((1 + LEVEL) / 2, difference.seeds - 1))
    return noncentrality(difference.seeds) * error


def direction(
    difference: SeedInterval | None, paper_difference: float | None, better: Better, paper_better: Better
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
    "difference", "difference_low", "difference_high", "paper_difference", "direction", "would_see",
)  # fmt: skip

Values = dict[str, dict[int, dict[str, float]]]


@dataclass
class Results:
    """What is known of a table.

    Attributes:
        values: values by row, seed and metric.
        missing: metrics without a value, with the reason.
        stages: all finished stages: name, hash, seconds, row, seed, revision.
        cost: how each row's cost came about, for a table that tells it.
    """

    values: Values = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    cost: dict[str, dict[str, Any]] = field(default_factory=dict)


def finished_rows(
    planner: AblationPlanner, rows: Mapping[int, Sequence[str]], finished: Callable[[AblationStage], bool] = is_done
) -> dict[int, list[str]]:
    """The rows of each seed whose own stages are all finished; what serves all rows may be missing."""
    return {
        seed: [row for row in names if all(map(finished, planner.before_gathering(row, seed)))]
        for seed, names in rows.items()
    }


def collect(planner: AblationPlanner, rows: Mapping[int, Sequence[str]]) -> Results:
    """Read every value of some rows that exists, from the evaluations of exactly those that are finished.

    What a video costs is not among them: see `costs.add_costs`.
    """
    results = Results()
    plan = planner.plan(finished_rows(planner, rows))
    reports: dict[str, dict[str, Any]] = {}
    for (row, seed, name), digest in plan.goals.items():
        stage = plan.stages[digest]
        read = [metric for metric in planner.table.metrics.values() if metric.stage == name and not metric.counted]
        if not read or not is_done(stage):
            continue
        if digest not in reports:
            reports[digest] = json.loads((stage.folder / REPORT).read_text())
        for metric in read:
            _take(results, metric, row, seed, reports[digest])
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
        results.missing.setdefault(metric.name, reason or f"{method}: the evaluation gives no {metric.column}")


def _stage_records(plan: Plan) -> list[dict[str, Any]]:
    """One record per finished stage; row and seed are null where it serves several."""
    records = []
    for stage in plan.stages.values():
        if (done := done_record(stage)) is not None:
            rows, seeds = {row for row, _ in stage.uses}, {seed for _, seed in stage.uses}
            record = {"name": stage.name, "hash": stage.digest, "seconds": done.get("seconds")}
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


def _line(table: Table, values: Values, name: str, metric: MetricSpec, own: dict[int, float]) -> dict[str, Any]:
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
        "would_see": detectable(difference),
    }


def power_record(rows: Sequence[Mapping[str, Any]], reference: str) -> dict[str, Any]:
    """What the seeds would have seen, and the verdicts on the paper's directions, by row and metric.

    Also p-values, and these corrected for the number of rows: of those with the paper's direction, where there are any.
    """
    found: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[bool, dict[str, float]]] = {}
    for row in rows:
        if row["row"] != reference and row["would_see"] is not None:
            said = {"would_have_seen": row["would_see"]} | ({"verdict": verdict(row)} if verdict(row) else {})
            found.setdefault(row["row"], {})[row["metric"]] = said
            said["p"] = p_value(row["difference"], row["difference_low"], row["seeds"], LEVEL)
            directed = bool(row["paper_difference"])
            groups.setdefault(row["metric"], {}).setdefault(directed, {})[row["row"]] = said["p"]
    for metric, group in groups.items():
        for name, corrected in holm(group.get(True) or group[False]).items():
            found[name][metric]["p_holm"] = corrected
    return {"probability": POWER, "two_sided_level": round(1 - LEVEL, 6), "rows": found}


def _by_seed(values: Values, row: str, metric: str) -> dict[int, float]:
    return {seed: found[metric] for seed, found in sorted(values.get(row, {}).items()) if metric in found}


_NUMBERS = ("mean", "low", "high", "difference", "difference_low", "difference_high", "would_see")


@dataclass(frozen=True)
class ResultsProvenance:
    """Where results come from: versions of packages by name, the date in ISO format."""

    command: str
    revision: str
    device: str
    packages: Mapping[str, str]
    date: str


def write_results(
    table: Table, results: Results, failed: Mapping[str, Mapping[int, str]], provenance: ResultsProvenance, path: Path
) -> list[Path]:
    """Write the table beside `path`, a CSV, as .csv, .json and .md; `failed` has the reasons by row and seed.

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


def read_results(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Read a table and, if it exists, the JSON file beside it.

    Returns:
        At least one row by `COLUMNS`, in which means, differences and their ends are numbers, NaN for none, and the
        paper's values are as in the file; and the JSON file's content, empty without one.

    Raises:
        FileNotFoundError: no such table.
        ValueError: other columns, invalid values, or not JSON; one line, which does not name the table.
    """
    if not path.is_file():
        raise FileNotFoundError("missing")
    reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
    # Tables from before power was told lack the last column.
    lacking = [column for column in COLUMNS[:-1] if column not in (reader.fieldnames or ())]
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
    return rows, read_json(beside) if beside.is_file() else {}


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
        return float(row[key]) if row.get(key, "").strip() else math.nan
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
        **asdict(provenance),
        "power": power_record(result_rows(table, results.values), table.reference),
        "rows": results.values,
        "notes": {row.name: row.note for row in table.rows.values() if row.note},
        "missing": results.missing,
        "failed": failed,
        "stages": results.stages,
        **({"cost": results.cost} if results.cost else {}),
        **({"paper": table.paper} if table.paper else {}),
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
