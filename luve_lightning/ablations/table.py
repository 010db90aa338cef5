"""A table of ablations: its rows, what runs for them, and what is reported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from luve_lightning.config_files import read_config

ROW = "{row}"

Better = Literal["higher", "lower", ""]


@dataclass(frozen=True)
class StageSpec:
    """One `luve` command of a row.

    Attributes:
        name: name of the stage; other stages refer to its folder as `{name}`.
        verb: verb of the command.
        config: configuration files, in order.
        options: options that follow them, by dotted key. Texts may hold `{seed}`, `{row}`, `{out}` (the stage's
            own folder), `{cache}` (a folder that all stages share) and another stage's `{name}`.
    """

    name: str
    verb: str
    config: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gathers(self) -> bool:
        """Whether one run serves all rows of a seed: it has an option whose key holds `{row}`, given for each row."""
        return any(ROW in key for key in self.options)

    @property
    def shared(self) -> StageSpec:
        """The stage without the values of options that each row gives; these may differ."""
        return replace(self, options={key: None if ROW in key else x for key, x in self.options.items()})


@dataclass(frozen=True)
class MetricSpec:
    """A number that is reported for each row.

    Attributes:
        name: name in the table.
        better: which direction is better; empty: neither, as of a number to be read beside others.
        unit: unit of the value.
        stage: stage, an evaluation, whose report holds it.
        column: its column in that report.
        method: its method in that report.
        paper: the paper's column to show beside it; None has no counterpart.
        paper_better: which direction is better in the paper.
        counted: whether it is a cost, which comes from plans and records rather than from a report.
    """

    name: str
    better: Better
    unit: str
    stage: str
    column: str
    method: str
    paper: str | None
    paper_better: Better
    counted: bool = False

    @property
    def sense(self) -> str:
        """In words, which direction is better; empty where neither is."""
        return f"{self.better} is better" if self.better else ""


@dataclass(frozen=True)
class CostSpec:
    """That a table tells what a video of each row costs.

    Attributes:
        stage: stage, a `luve generate`, that makes a row's videos.
        plots: metrics drawn against the cost.
    """

    stage: str
    plots: tuple[str, ...]


@dataclass(frozen=True)
class RowCost:
    """What a row's cost counts where its stage makes more than the row needs.

    Attributes:
        plan: options of `luve plan` laid over the stage's, by dotted key. The records of the videos then say nothing of
            the row's seconds.
        note: what a reader must know; may be empty.
    """

    plan: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class AblationRow:
    """One row.

    Attributes:
        name: name of its file.
        title: title in the paper's words.
        stages: by name.
        paper: the paper's values, by the paper's column.
        note: what a reader must know; may be empty.
        cost: what its cost counts.
    """

    name: str
    title: str
    stages: Mapping[str, StageSpec]
    paper: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    cost: RowCost = RowCost()


@dataclass(frozen=True)
class Table:
    """A table of ablations.

    Attributes:
        name: name of its folder.
        title: what it compares, with the paper's table.
        world: a sentence about whose numbers these are, repeated in every file of results.
        results: its folder under experiments/results, the world's short name.
        seeds: seeds of its repetitions.
        reference: row that all others are compared with.
        metrics: by name.
        rows: rows by name, in order.
        note: what a reader must know; may be empty.
        settings: sizes of the runs, by name; rows may change them.
        cost: that the cost of a video is told; None tells none.
        paper: tables of the paper, shown apart: numbers by title, row and column.
    """

    name: str
    title: str
    world: str
    results: str
    seeds: tuple[int, ...]
    reference: str
    metrics: Mapping[str, MetricSpec]
    rows: Mapping[str, AblationRow]
    note: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    cost: CostSpec | None = None
    paper: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)


TFLOP, SECONDS = "tflop", "seconds"
"""Metrics that a table with a cost has, too."""

TABLE_FILE = "table.yaml"

_TABLE_KEYS = (
    "extends", "title", "world", "results", "note", "seeds", "reference", "rows", "metrics", "settings", "stages",
    "cost", "paper",
)  # fmt: skip
_ROW_KEYS = ("title", "note", "paper", "settings", "stages", "cost")
_STAGE_KEYS = ("verb", "config", "options")
_METRIC_KEYS = ("better", "unit", "stage", "column", "method", "paper", "paper_better")
_REQUIRED = ("title", "world", "results", "seeds", "reference", "rows", "metrics", "stages")
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TAKEN = ("seed", "out", "cache", "row")


def read_table(folder: Path, changes: Mapping[str, Any] | None = None) -> Table:
    """The table in a folder.

    Args:
        folder: holds `table.yaml` and `<row>.yaml` for each row that it names.
        changes: laid over `table.yaml`; rows are laid over both.

    Raises:
        ValueError: a file is missing or wrong; the message names the file and the key.
    """
    base, changes = _read(folder / TABLE_FILE, _TABLE_KEYS, "table"), dict(changes or {})
    # A misspelt key, or an overlay for another table, would change nothing.
    _check_keys(changes.get("settings") or {}, tuple(base.get("settings") or {}), "settings.")
    base = merged(base, changes)
    where = str(folder / TABLE_FILE)
    for key in _REQUIRED:
        if not base.get(key):
            raise ValueError(f"{where}: {key}: required, but not given")
    rows = {name: _read_row(folder, _name(name, f"{where}: rows"), base) for name in base["rows"]}
    if base["reference"] not in rows:
        raise ValueError(f"{where}: reference: expected one of {', '.join(rows)}, got {base['reference']!r}")
    plain = _resolved({key: base.get(key) or {} for key in ("settings", "metrics")}, where)
    metrics = {
        name: _metric(name, spec, f"{where}: metrics.{name}")
        for name, spec in plain["metrics"].items()
        if spec is not None
    }
    cost = _cost(base.get("cost"), metrics, f"{where}: cost")
    if cost is not None:
        metrics |= {
            name: MetricSpec(name, "lower", unit, cost.stage, name, ROW, None, "lower", counted=True)
            for name, unit in ((TFLOP, "TFLOP a video"), (SECONDS, "s a video"))
        }
    for row in rows.values():
        if cost is None and row.cost != RowCost():
            raise ValueError(f"{folder / row.name}.yaml: cost: {where} does not ask for cost")
        for metric in metrics.values():
            if metric.stage not in row.stages:
                raise ValueError(f"{where}: metrics.{metric.name}.stage: row {row.name} has no {metric.stage}")
    _check_gathering(rows, where)
    return Table(
        folder.name,
        str(base["title"]),
        str(base["world"]),
        str(base["results"]),
        _seeds(base["seeds"], where),
        str(base["reference"]),
        metrics,
        rows,
        " ".join(str(base.get("note") or "").split()),
        plain["settings"],
        cost,
        _paper_tables(base.get("paper") or {}, f"{where}: paper"),
    )


def merged(base: Any, over: Any) -> Any:
    """`over` laid over `base`: mappings key by key, anything else is replaced; a key set anew comes last."""
    if not isinstance(base, Mapping) or not isinstance(over, Mapping):
        return over
    result = dict(base)
    for key, value in over.items():
        value = merged(base[key], value) if key in base else value
        if key in result and not isinstance(value, Mapping):
            del result[key]  # a row's option must follow the table's
        result[key] = value
    return result


def _read_row(folder: Path, name: str, base: Mapping[str, Any]) -> AblationRow:
    file = folder / f"{name}.yaml"
    own = _read(file, _ROW_KEYS, f"{folder / TABLE_FILE}: rows")
    tree = {key: merged(base.get(key) or {}, own.get(key) or {}) for key in ("settings", "stages")}
    stages = {
        _name(stage, f"{file}: stages"): _stage(stage, spec, f"{file}: stages.{stage}")
        for stage, spec in _resolved(tree, str(file))["stages"].items()
        if spec is not None
    }
    paper = own.get("paper") or {}
    if not isinstance(paper, dict) or any(
        isinstance(value, bool) or not isinstance(value, int | float) for value in paper.values()
    ):
        raise ValueError(f"{file}: paper: expected numbers by the paper's column, got {paper!r}")
    values = {str(column): float(value) for column, value in paper.items()}
    note = " ".join(str(own.get("note") or "").split())
    cost = _row_cost(own.get("cost"), f"{file}: cost")
    return AblationRow(name, str(own.get("title") or name.replace("_", " ")), stages, values, note, cost)


def _read(file: Path, known: tuple[str, ...], where: str) -> dict[str, Any]:
    content = read_config(file, where, merged)
    _check_keys(content, known, f"{file}: ")
    return content


def _resolved(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A copy with `${settings.key}` replaced."""
    try:
        plain = OmegaConf.to_container(OmegaConf.create(dict(tree)), resolve=True)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ValueError(f"{where}: {key}{str(error).splitlines()[0]}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _stage(name: str, spec: Any, where: str) -> StageSpec:
    if name in _TAKEN:
        raise ValueError(f"{where}: {{{name}}} means something else already; choose another name")
    if not isinstance(spec, dict) or not isinstance(spec.get("verb"), str):
        raise ValueError(f"{where}: expected verb, config and options, got {spec!r}")
    _check_keys(spec, _STAGE_KEYS, f"{where}.")
    config, options = spec.get("config") or [], spec.get("options") or {}
    if not isinstance(config, list) or not isinstance(options, dict):
        raise ValueError(f"{where}: expected a list of files (config) and options by dotted key (options)")
    return StageSpec(name, spec["verb"], tuple(map(str, config)), {str(k): v for k, v in options.items()})


def _metric(name: str, spec: Any, where: str) -> MetricSpec:
    if not isinstance(spec, dict):
        raise ValueError(f"{where}: expected better, unit, stage, column, method or paper, got {spec!r}")
    _check_keys(spec, _METRIC_KEYS, f"{where}.")
    better = _better(spec.get("better"), f"{where}.better")
    paper_better = _better(spec.get("paper_better", spec.get("better")), f"{where}.paper_better")
    if spec.get("paper") is not None and not (better and paper_better):
        raise ValueError(f"{where}.paper: expected none, because neither direction is better")
    return MetricSpec(
        name,
        better,
        str(spec.get("unit") or ""),
        str(spec.get("stage") or "evaluate"),
        str(spec.get("column") or name),
        str(spec.get("method") or ROW),
        None if spec.get("paper") is None else str(spec["paper"]),
        paper_better,
    )


def _cost(spec: Any, metrics: Mapping[str, MetricSpec], where: str) -> CostSpec | None:
    if not spec:
        return None
    if not isinstance(spec, dict):
        raise ValueError(f"{where}: expected stage and plots, got {spec!r}")
    _check_keys(spec, ("stage", "plots"), f"{where}.")
    if taken := [name for name in (TFLOP, SECONDS) if name in metrics]:
        raise ValueError(f"{where}: the metric {taken[0]} has the name of a cost; choose another name")
    plots = list(metrics) if spec.get("plots") is None else spec["plots"]
    if not isinstance(plots, list) or any(name not in metrics for name in plots):
        raise ValueError(f"{where}.plots: expected some of {', '.join(metrics)}, got {plots!r}")
    return CostSpec(str(spec.get("stage") or "generate"), tuple(plots))


def _row_cost(spec: Any, where: str) -> RowCost:
    if spec is None:
        return RowCost()
    if not isinstance(spec, dict) or not isinstance(spec.get("plan") or {}, dict):
        raise ValueError(f"{where}: expected options of luve plan by dotted key (plan) and a note, got {spec!r}")
    _check_keys(spec, ("plan", "note"), f"{where}.")
    plan = {str(key): value for key, value in (spec.get("plan") or {}).items()}
    return RowCost(plan, " ".join(str(spec.get("note") or "").split()))


def _paper_tables(spec: Any, where: str) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    try:
        for title, rows in spec.items():
            for name, cells in rows.items():
                values = {str(column): float(value) for column, value in cells.items()}
                found.setdefault(str(title), {})[str(name)] = values
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{where}: expected numbers by title, row and column, got {spec!r}") from None
    return found


def _better(value: Any, where: str) -> Better:
    if value not in ("higher", "lower", "neither"):
        raise ValueError(f"{where}: expected higher, lower or neither, got {value!r}")
    return "" if value == "neither" else cast(Better, value)


def _check_gathering(rows: Mapping[str, AblationRow], where: str) -> None:
    """Refuse a stage that serves all rows but differs between them, other than in options that are given for each."""
    found: dict[str, tuple[str, StageSpec]] = {}
    for row in rows.values():
        for stage in row.stages.values():
            first, other = found.setdefault(stage.name, (row.name, stage))
            if (stage.gathers or other.gathers) and stage.shared != other.shared:
                raise ValueError(
                    f"{where}: stages.{stage.name} runs once for all rows, but {first} and {row.name} have it otherwise"
                )


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    good = isinstance(value, list) and all(isinstance(s, int) and s >= 0 for s in value)
    if not good or len(set(value)) < len(value):
        raise ValueError(f"{where}: seeds: expected different whole numbers >= 0, got {value!r}")
    return tuple(value)


def _name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{where}: {name!r}: expected a name of small letters, digits and _")
    return name


def _check_keys(content: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in content:
        if key not in known:
            raise ValueError(f"{where}{key}: unknown key; known: {', '.join(known)}")
