"""What a video of each row costs: FLOPs as planned, seconds as recorded; quality drawn against both.

FLOPs are those of one video at the table's size, all stages, counted by what `luve plan` counts with. They are not
measured, and what a training takes is not among them. Seconds are those of the stages in the videos' own records,
prompts' encoding included, without loading, storing and writing. A stage that was taken from a store has no seconds of
its own; those in the record of the run that made it are added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luve_lightning.ablations.graph import AblationPlanner, AblationStage
from luve_lightning.ablations.stage_process import done_record, is_done
from luve_lightning.ablations.table import SECONDS, TFLOP, Table
from luve_lightning.evaluation.tables import table_markdown
from luve_lightning.files import find_json, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from luve_lightning.ablations.results import Results

PlanVideo = Callable[[Sequence[str], Mapping[str, Any]], Mapping[str, Any]]
"""The plan of a video, as `luve plan` writes it: from the words of a `luve generate` and options laid over them.

It raises a ValueError of one line for what cannot be planned.
"""

_ABOUT = (
    "TFLOP: of one video at the table's size, all stages, counted by `luve plan` from the row's own options; not "
    "measured, and without trainings. Seconds: means over the videos' own records, the prompts' encoding included, "
    "without loading, storing and writing; a process's first video takes longer and is among them, and stages run "
    "beside each other (`--slots`) shared the machine. Where a stage came from a store, the recorded seconds of "
    "the run that made it are added."
)
_LABEL = (0.22, 0.04)  # width and height of a label, as shares of the axes
_PAPER = "Of other models on another world, copied from the paper: none of them is ours."


@dataclass
class RecordedSeconds:
    """What the records of a stage's videos say.

    Attributes:
        videos: seconds of each video whose every stage has a record.
        unknown: number of other videos.
        stored: stages that were taken from a store.
        machines: where they were run.
    """

    videos: list[float] = field(default_factory=list)
    unknown: int = 0
    stored: set[str] = field(default_factory=set)
    machines: set[str] = field(default_factory=set)


def recorded_seconds(stage: AblationStage, earlier: Sequence[AblationStage]) -> RecordedSeconds:
    """Read the records in a stage's folder.

    Args:
        stage: made the videos.
        earlier: stages whose stored latents it may have used.
    """
    found = RecordedSeconds()
    for file, record in _records(stage):
        whole = float(record["seconds"].get("embedding", 0.0))
        machines = {_machine(stage, record)}
        stored = set()
        for part in record["stages"]:
            seconds = part["seconds"]
            if seconds is None:
                stored.add(part["stage"])
                seconds, where = _seconds_elsewhere(file.name, part, earlier)
                machines.add(where)
            whole += seconds
        if math.isnan(whole):
            found.unknown += 1
            continue
        found.videos.append(whole)
        found.stored |= stored
        found.machines |= machines
    return found


def _records(stage: AblationStage) -> Iterator[tuple[Path, dict[str, Any]]]:
    for file in sorted(stage.folder.glob("*.json")):
        record = find_json(file)
        if {"recipe", "stages", "seconds"} <= record.keys():
            yield file, record


def _seconds_elsewhere(name: str, part: Mapping[str, Any], earlier: Sequence[AblationStage]) -> tuple[float, str]:
    """Seconds of the run that made stored latents, and its machine; NaN without a record of it.

    Videos of one prompt, seed and size have one name in all folders.
    """
    for stage in earlier:
        record = find_json(stage.folder / name)
        for other in record.get("stages", ()):
            same = (other["stage"], other["latents"]) == (part["stage"], part["latents"])
            if same and other["seconds"] is not None:
                return float(other["seconds"]), _machine(stage, record)
    return math.nan, ""


def _machine(stage: AblationStage, record: Mapping[str, Any]) -> str:
    """A GPU's name; of a CPU its architecture, as the stage was told, and the number of threads."""
    if record.get("device") != "cpu":
        return str(record.get("device") or "an unknown machine")
    return f"{(done_record(stage) or {}).get('device', 'CPU')}, threads: {record.get('threads')}"


def add_costs(
    results: Results, planner: AblationPlanner, rows: Mapping[int, Sequence[str]], plan_video: PlanVideo
) -> None:
    """Add each row's cost to results that have its quality; nothing for a table that does not ask for it.

    Args:
        results: from `collect`, of these rows.
        planner: of the table.
        rows: finished rows of each seed.
        plan_video: see PlanVideo; called once a row.
    """
    if planner.table.cost is None:
        return
    plan = planner.plan(rows)
    for row in planner.table.rows.values():
        seeds = [seed for seed in rows if row.name in rows[seed] and results.values.get(row.name, {}).get(seed)]
        made = {seed: plan.stages[plan.goals[row.name, seed, planner.table.cost.stage]] for seed in seeds}
        made = {seed: stage for seed, stage in made.items() if is_done(stage)}
        if not made:
            continue
        facts: dict[str, Any] = {"note": row.cost.note} if row.cost.note else {}
        try:
            planned = plan_video(next(iter(made.values())).words, row.cost.plan)
        except ValueError as error:
            results.missing.setdefault(TFLOP, f"{row.name}: {error}")
        else:
            facts["tflop"] = {stage["stage"]: stage["flops"] / 1e12 for stage in planned["stages"]}
            for seed in made:
                results.values[row.name][seed][TFLOP] = planned["flops"] / 1e12
        if row.cost.plan:
            results.missing.setdefault(SECONDS, f"{row.name}: its videos' records are of more than the row needs")
        else:
            facts |= _add_seconds(results, row.name, made, plan.stages)
        results.cost[row.name] = facts


def _add_seconds(
    results: Results, row: str, made: Mapping[int, AblationStage], stages: Mapping[str, AblationStage]
) -> dict[str, Any]:
    whole = RecordedSeconds()
    for seed, stage in made.items():
        found = recorded_seconds(stage, [stages[digest] for digest in stage.needs])
        if found.videos:
            results.values[row][seed][SECONDS] = math.fsum(found.videos) / len(found.videos)
        whole.videos += found.videos
        whole.unknown += found.unknown
        whole.stored |= found.stored
        whole.machines |= found.machines
    if not whole.videos:
        results.missing.setdefault(SECONDS, f"{row}: no record of its videos tells the seconds of every stage")
    return {
        "videos": len(whole.videos),
        "videos_without_seconds": whole.unknown,
        "from_store": sorted(whole.stored),
        "machines": sorted(whole.machines),
    }


def cost_markdown(cost: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is counted, and a line for each row; nothing without a cost."""
    if not cost:
        return []
    lines = [f"- {row}: {'; '.join(_told(facts))}" for row, facts in cost.items()]
    return ["## Cost", _ABOUT, "\n".join(lines)]


def _told(facts: Mapping[str, Any]) -> Iterator[str]:
    if "tflop" in facts:
        yield "TFLOP: " + ", ".join(f"{stage} {value:.3g}" for stage, value in facts["tflop"].items())
    if facts.get("videos"):
        yield f"seconds of {facts['videos']} videos on {' and '.join(facts['machines'])}"
    if facts.get("videos_without_seconds"):
        yield f"{facts['videos_without_seconds']} videos without the seconds of every stage are left out"
    if facts.get("from_store"):
        yield f"from a store, its recorded seconds added: {', '.join(facts['from_store'])}"
    if facts.get("note"):
        yield str(facts["note"])


def paper_markdown(tables: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """The paper's tables, under a heading that says whose they are; nothing without one."""
    if not tables:
        return []
    parts = ["## The paper's own numbers", _PAPER]
    for title, rows in tables.items():
        columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
        # As many decimals as the paper prints.
        digits = {c: max(len(f"{x.get(c, 0):.10g}".partition(".")[2]) for x in rows.values()) for c in columns}
        lines = [
            {"model": name} | {c: f"{cells[c]:.{digits[c]}f}" if c in cells else "" for c in columns}
            for name, cells in rows.items()
        ]
        parts += [f"### {title}", table_markdown(["model", *columns], lines).rstrip()]
    return parts


def write_cost_plot(table: Table, rows: Sequence[Mapping[str, Any]], path: Path) -> list[Path]:
    """Draw quality against cost beside a table of results, as .png and .svg.

    Args:
        table: whose rows these are.
        rows: of `result_rows`.
        path: the table's CSV.

    Returns:
        The written files; none for a table without a cost, or where no row has both.
    """
    figure = None if table.cost is None else draw_costs(table, rows)
    if figure is None:
        return []
    import matplotlib

    files = [path.with_suffix(".png"), path.with_suffix(".svg")]
    # Without them the same numbers give another SVG every time.
    with matplotlib.rc_context({"svg.hashsalt": table.name}):
        for file in files:
            kind = file.suffix[1:]
            with replacing(file) as temporary:
                figure.savefig(temporary, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return files


def draw_costs(table: Table, rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """One panel for each plotted metric and cost: a point a row with its interval, cost on a logarithmic axis.

    The figure is not one of pyplot's, which belong to the process. None where no row has a cost and a quality.
    """
    import matplotlib
    from matplotlib.figure import Figure

    assert table.cost is not None
    found = {(row["row"], row["metric"]): row for row in rows}
    costs = [name for name in (TFLOP, SECONDS) if any(metric == name for _, metric in found)]
    plots = [name for name in table.cost.plots if any(metric == name for _, metric in found)]
    if not costs or not plots:
        return None
    with matplotlib.rc_context(matplotlib.rcParamsDefault):  # a user's matplotlibrc must not change a result
        size = (6 * len(costs), 0.6 + 4 * len(plots))
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        shades = matplotlib.colormaps["tab10" if len(table.rows) <= 10 else "tab20"]
        colours = {name: shades(number % shades.N) for number, name in enumerate(table.rows)}
        panels = figure.subplots(len(plots), len(costs), squeeze=False)
        for line, plot in zip(panels, plots, strict=True):
            for axes, cost in zip(line, costs, strict=True):
                names = [name for name in table.rows if {(name, plot), (name, cost)} <= found.keys()]
                points = {name: (found[name, cost], found[name, plot]) for name in names}
                _draw_points(axes, points, colours)
                quality, price = table.metrics[plot], table.metrics[cost]
                unit = f", {quality.unit}" if quality.unit else ""
                sense = f" ({quality.sense})" if quality.sense else ""
                axes.set(xlabel=price.unit, ylabel=f"{plot}{unit}{sense}")
        figure.suptitle(f"{table.title}\n{table.world}", fontsize="small", wrap=True)
    return figure


def _draw_points(
    axes: Axes, points: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]], colours: Mapping[str, Any]
) -> None:
    """Bars are 95 % intervals over seeds. Labels that would lie over each other stand above each other."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.margins(x=0.19, y=0.1)
    for name, (cost, quality) in points.items():
        axes.errorbar(
            cost["mean"], quality["mean"], xerr=_reach(cost, positive=True), yerr=_reach(quality), fmt="o",
            color=colours[name], markersize=4, linewidth=1, capsize=2, zorder=4,
        )  # fmt: skip
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # before this they are not worked out
    to_share = axes.transScale + axes.transLimits  # from data to shares of the axes' width and height
    places = {name: to_share.transform((cost["mean"], quality["mean"])) for name, (cost, quality) in points.items()}
    placed: list[tuple[float, float]] = []
    for name, (across, up) in sorted(places.items(), key=lambda place: float(place[1][1])):
        for other, height in placed:  # from the lowest up
            if abs(across - other) < _LABEL[0]:
                up = max(up, height + _LABEL[1])
        placed.append((across, up))
        axes.annotate(
            name, (points[name][0]["mean"], points[name][1]["mean"]), xytext=(across + 0.025, up),
            textcoords="axes fraction", fontsize="x-small", verticalalignment="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": colours[name], "shrinkA": 0, "shrinkB": 2},
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
        )  # fmt: skip
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(linewidth=0.4, alpha=0.5)


def _reach(value: Mapping[str, Any], positive: bool = False) -> list[list[float]] | None:
    """How far an interval reaches down and up; None for one seed, and down to a hundredth where only > 0 is drawn."""
    if math.isnan(value["low"]) or value["low"] == value["high"]:
        return None
    low = max(value["low"], value["mean"] / 100) if positive else value["low"]
    return [[value["mean"] - low], [value["high"] - value["mean"]]]
