"""A table of ablations: its rows, what runs for them, and what is reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ROW = "{row}"

Better = Literal["higher", "lower"]


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


@dataclass(frozen=True)
class MetricSpec:
    """A number that is reported for each row.

    Attributes:
        name: name in the table.
        better: which direction is better.
        unit: unit of the value.
        stage: stage, an evaluation, whose report holds it.
        column: its column in that report.
        method: its method in that report.
        paper: the paper's column to show beside it; None has no counterpart.
        paper_better: which direction is better in the paper.
    """

    name: str
    better: Better
    unit: str
    stage: str
    column: str
    method: str
    paper: str | None
    paper_better: Better


@dataclass(frozen=True)
class AblationRow:
    """One row.

    Attributes:
        name: name of its file.
        title: title in the paper's words.
        stages: by name.
        paper: the paper's values, by the paper's column.
        note: what a reader must know; may be empty.
    """

    name: str
    title: str
    stages: Mapping[str, StageSpec]
    paper: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


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
