"""What a table of ablations is: its rows, what is run for them, and what is reported."""

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
        name: of the stage; other stages refer to its folder as `{name}`.
        verb: of the command.
        config: configuration files, in order.
        options: what is set after them, by dotted key. Texts may hold `{seed}`, `{row}`, `{out}` (the stage's own
            folder), `{cache}` (a folder that all stages share) and `{name}` of another stage.
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
    """A number that is reported of each row.

    Attributes:
        name: in the table.
        better: which direction is.
        unit: of the value.
        stage: the stage, an evaluation, whose report has it.
        column: its name there.
        method: the method there that is the row.
        paper: the paper's column that stands beside it; None has no counterpart.
        paper_better: which direction is better there.
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
class Row:
    """One row.

    Attributes:
        name: of its file.
        title: the paper's words.
        stages: by name.
        paper: the paper's values, by the paper's column.
        note: what a reader has to know; may be empty.
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
        name: of its folder.
        title: what it compares, with the paper's table.
        world: whose numbers these are, in a sentence that every file of results repeats.
        results: the folder under experiments/results for it, the world's short name.
        seeds: of its repetitions.
        reference: the row that all others are compared with.
        metrics: by name.
        rows: by name, in order.
        note: what a reader has to know; may be empty.
        settings: sizes of the runs, by name; rows may differ from them.
    """

    name: str
    title: str
    world: str
    results: str
    seeds: tuple[int, ...]
    reference: str
    metrics: Mapping[str, MetricSpec]
    rows: Mapping[str, Row]
    note: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
