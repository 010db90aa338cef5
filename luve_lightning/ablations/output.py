"""The output of `luve ablate`: progress, commands and table on a terminal, the table as Markdown, values for wandb."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as RichTable

from luve_lightning.ablations.costs import cost_markdown, paper_markdown
from luve_lightning.ablations.graph import AblationStage, Plan
from luve_lightning.ablations.runners import Slots, Standing
from luve_lightning.ablations.stage_process import Failure, log_path, missing_stages
from luve_lightning.ablations.table import Table
from luve_lightning.evaluation.tables import format_value, table_markdown, table_rich
from luve_lightning.terminal import amount, say

if TYPE_CHECKING:
    from luve_lightning.ablations.results import Results, ResultsProvenance, Values

_MOST_USES = 3


class RunWatcher:
    """A line for each stage that ends and, on a terminal, one below them that says what is running."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._status = console.status("") if console.is_terminal else None

    def __enter__(self) -> RunWatcher:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def standing(self, standing: Standing) -> None:
        """See AblationWatcher."""
        if self._status:
            running = ", ".join(
                f"{name} x {count}" if count > 1 else name for name, count in sorted(standing.running.items())
            )
            counts = f"{standing.done} of {amount(standing.total, 'stage')}{_left(standing)}"
            self._status.update(f"{counts}; running: {running or 'none'}")

    def finished(self, stage: AblationStage, seconds: float, standing: Standing) -> None:
        """See AblationWatcher."""
        say(
            self.console,
            f"{standing.done} of {standing.total}  {stage.label} ({uses(stage)})  {seconds:.0f} s{_left(standing)}",
        )

    def failed(self, failure: Failure) -> None:
        """See AblationWatcher."""
        lines = [f"FAILED  {failure.stage.label} ({uses(failure.stage)}), exit status {failure.code}"]
        lines += [f"    {line}" for line in failure.tail]
        say(self.console, "\n".join([*lines, f"    log: {log_path(failure.stage)}"]))


def uses(stage: AblationStage) -> str:
    """The rows and seeds that a stage serves, in words."""
    rows = list(dict.fromkeys(row for row, _ in sorted(stage.uses)))
    seeds = sorted({seed for _, seed in stage.uses})
    names = ", ".join(rows) if len(rows) <= _MOST_USES else f"{len(rows)} rows"
    return f"{names}; seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def start_line(plan: Plan, slots: Slots) -> str:
    """What is about to run: the first stage may take minutes."""
    missing = len(missing_stages(plan))
    if not missing:
        return f"all {len(plan.stages)} stages are finished already"
    at_once = "one at a time" if slots.count == 1 else f"{slots.count} at the same time"
    return f"{missing} of {amount(len(plan.stages), 'stage')} to run, {at_once}"


def dry_run_lines(plan: Plan, program: Sequence[str]) -> list[str]:
    """Every command, in an order in which they can run, with its purpose."""
    lines = []
    missing = missing_stages(plan)
    for digest, stage in plan.stages.items():
        done = "" if digest in missing else "done already: "
        lines.append(f"# {done}{stage.label} ({uses(stage)})")
        lines.append(shlex.join([*program, *stage.words]))
    lines.append(f"# {len(missing)} of {amount(len(plan.stages), 'stage')} to run")
    return lines


def results_lines(
    table: Table, rows: Sequence[dict[str, Any]], missing: Mapping[str, str], path: Path
) -> list[str | RichTable]:
    """One table per metric, the metrics that could not run, and the full file's path."""
    lines: list[str | RichTable] = []
    for metric in table.metrics.values():
        own = [row for row in rows if row["metric"] == metric.name]
        if not own:
            continue
        columns = ["row", "mean", "±", "difference", "its ±", "would see"]
        columns += ["paper's", "direction"] if metric.paper else []
        unit = f", {metric.unit}" if metric.unit else ""
        beside = f" (paper's: {metric.paper})" if metric.paper else ""
        sense = f", {metric.sense}" if metric.sense else ""
        title = f"{metric.name}{unit}{sense}{beside}"
        short = [{key: value for key, value in _shown(row).items() if key in columns} for row in own]
        # A line of its own: a table breaks its title at the width of its columns.
        lines += ["", title, table_rich(columns, short)]
    lines += [f"not measured: {name}: {why}" for name, why in missing.items()]
    about = (
        f"±: half the 95 % interval over seeds; differences are from {table.reference}, paired by seed; would see: the "
        "true difference that as many seeds tell from 0 with a probability of 80 %"
    )
    lines += ["", about, table.world, f"{path.name}, {path.stem}.json and {path.stem}.md in {path.parent}"]
    if (plot := path.with_suffix(".png")).is_file() and table.cost is not None:
        lines.append(f"quality against cost: {plot.name} and {path.stem}.svg there")
    return lines


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the table in few columns: intervals are equally wide to both sides."""
    apart = None if row["difference"] is None else row["difference_high"] - row["difference"]
    return {
        "row": row["row"],
        "mean": row["mean"],
        "±": row["high"] - row["mean"],
        "difference": row["difference"],
        "its ±": apart,
        "would see": row["would_see"],
        "paper's": row["paper_difference"],
        "direction": row["direction"],
    }


def _left(standing: Standing) -> str:
    if standing.seconds_left is None or standing.done == standing.total:
        return ""
    minutes = standing.seconds_left / 60
    if minutes < 1:
        return f", about {standing.seconds_left:.0f} s left"
    return f", about {minutes:.0f} min left" if minutes < 120 else f", about {minutes / 60:.1f} h left"


_ABOUT = (
    "Each value is a mean over seeds with its 95 % interval by Student's t (none for one seed). Differences are from "
    "the row `{reference}`, paired by seed, with intervals of their own. Would see: the true difference that as many "
    "seeds would have told from 0 with a probability of 80 % (paired t-test, two-sided at 5 %), by the "
    "spread of these. Paper: the paper's value, of the metric in brackets, on another world with other models: compare "
    "directions, never values. Verdict: whether the paper's direction holds; not decided where the interval holds 0 or "
    "there is one seed only."
)


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
            sense = f", {metric.sense}" if metric.sense else ""
            parts.append(f"## {metric.name}{unit}{sense}")
            parts.append(table_markdown(columns, lines).rstrip())
    parts.append(_ABOUT.format(reference=table.reference))
    parts += cost_markdown(results.cost) + paper_markdown(table.paper)
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
    line["would see"] = short(row["would_see"] or None)  # 0 is the reference row's
    if row["paper_metric"]:
        line[f"paper ({row['paper_metric']})"] = format_value(row["paper"])
        line["paper's difference"] = short(row["paper_difference"])
        line["verdict"] = verdict(row)
    return line


def _difference(row: Mapping[str, Any]) -> str:
    """A difference with its interval, if any; the reference row's is 0 and needs none."""
    low, high = row["difference_low"], row["difference_high"]
    if low is None or math.isnan(low) or low == high:
        return short(row["difference"])
    return f"{short(row['difference'])} [{short(low)}, {short(high)}]"


def _listed(title: str, lines: Mapping[str, str]) -> list[str]:
    return [f"## {title}", "\n".join(f"- {name}: {text}" for name, text in lines.items())] if lines else []


def short(difference: float | None) -> str:
    """A difference in three digits, with an exponent where it is tiny; empty for none."""
    return "" if difference is None else f"{difference:.3g}"


def verdict(row: Mapping[str, Any]) -> str:
    """In words, what a line of `result_rows` says of the paper's direction; empty where the paper has none."""
    if row["direction"] != "none":
        return {"same": "holds", "opposite": "opposite"}.get(row["direction"], "")
    size = row["would_see"]
    if size == 0:
        return "not decided (no seed differs)"
    return "not decided (one seed)" if size is None else f"not decided (would have seen {short(size)})"


def p_value(difference: float, low: float, count: int, level: float = 0.95) -> float:
    """The two-sided p-value of a paired t-test, from the interval of its mean difference.

    Args:
        difference: mean over `count` seeds.
        low: lower end of its interval at `level`, as `results.t_interval` gives it.
        count: seeds, >= 2.
        level: of the interval.

    Raises:
        ValueError: for fewer than two seeds.
    """
    if count < 2:
        raise ValueError(f"expected at least two seeds, got {count}")
    from scipy.stats import t

    error = (difference - low) / float(t.ppf((1 + level) / 2, count - 1))
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return 2 * float(t.sf(math.fabs(difference) / error, count - 1))


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number (S. Holm, Scandinavian Journal of Statistics 6, 1979).

    With those below 5 % taken for true differences, the probability of any false one among them is at most 5 %,
    whatever the dependence between the tests.
    """
    corrected: dict[str, float] = {}
    least = 0.0
    for place, key in enumerate(sorted(values, key=values.__getitem__)):
        least = max(least, min(1.0, (len(values) - place) * values[key]))
        corrected[key] = least
    return {key: corrected[key] for key in values}


# The stages are processes of their own: with these they would log into the sweep's run, over each other.
_OF_THE_RUN = ("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_ID", "WANDB_SERVICE")


@contextmanager
def sweep_run(table: str, rows: Sequence[str], seeds: Sequence[int], prefix: str) -> Iterator[Callable[[Values], None]]:
    """The sweep's run for the duration of the context; it fails when the context does. Nothing without a sweep.

    Args:
        table: name of the table, the run's group.
        rows: this call's; they and the seeds are the run's configuration and tags.
        seeds: this call's.
        prefix: prefix of a metric's name, where dashboards look for results.

    Yields:
        Logs results, by row, seed and metric, under the prefix: means over this call's rows and seeds (an agent
        gives one each).
    """
    if "WANDB_SWEEP_ID" not in os.environ:
        yield lambda values: None
        return
    import wandb

    row, seed = (",".join(map(str, some)) for some in (rows, seeds))
    run = wandb.init(
        job_type="ablation",
        group=table,
        name=f"{table} {row} seed {seed}",
        tags=["ablation", table, f"seed {seed}"],
        config={"table": table, "row": row, "seed": seed},
        allow_val_change=True,
    )
    kept = {name: os.environ.pop(name) for name in _OF_THE_RUN if name in os.environ}

    def log(values: Values) -> None:
        found: dict[str, list[float]] = {}
        for metrics in (values.get(name, {}).get(number, {}) for name in rows for number in seeds):
            for metric, value in metrics.items():
                found.setdefault(f"{prefix}{metric}", []).append(value)
        run.log({metric: sum(some) / len(some) for metric, some in found.items()})

    failed = True
    try:
        yield log
        failed = False
    finally:
        os.environ.update(kept)
        run.finish(exit_code=int(failed))
