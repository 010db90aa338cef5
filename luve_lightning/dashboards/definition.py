"""What a dashboard shows: sections of panels, named by the metrics that the tasks and callbacks log."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

PREFIX_OF_RESULTS = "result/"

Kind = Literal["lines", "last", "results"]


@dataclass
class Panel:
    """One panel; its title is its key in the section.

    Args:
        metrics: names as they are logged, such as `val/psnr_rgb`.
        pattern: regular expression of names besides; it must match a whole name.
        kind: `lines` over training steps; `last`, each run's last value; `results`, what an ablation's row came to
            (`result/<metric>`); a report has the tables of `luve ablate` instead.
    """

    metrics: list[str] = field(default_factory=list)
    pattern: str | None = None
    kind: Kind = "lines"

    def __post_init__(self) -> None:
        if not self.metrics and self.pattern is None:
            raise ValueError("panel: expected metrics or a pattern, got neither")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"pattern: {self.pattern!r} is no regular expression: {error}") from error
        if self.kind != "lines" and self.pattern is not None:
            raise ValueError(f"pattern: a panel of kind {self.kind} takes metrics only")
        if self.kind == "results" and any(not name.startswith(PREFIX_OF_RESULTS) for name in self.metrics):
            raise ValueError(
                f"metrics: those of kind results start with {PREFIX_OF_RESULTS}, got {self.metrics}"
            )

    def chosen(self, names: Iterable[str]) -> list[str]:
        """Which of these names the panel shows: its metrics in their order, then what the pattern matches, sorted."""
        known = set(names)
        matched = {name for name in known if self.pattern is not None and re.fullmatch(self.pattern, name)}
        return [*(name for name in self.metrics if name in known), *sorted(matched - set(self.metrics))]


@dataclass
class Section:
    """Panels by their titles.

    Args:
        panels: in order.
        local_only: the section is in reports, not in the workspace.
    """

    panels: dict[str, Panel]
    local_only: bool = False


@dataclass
class Dashboard:
    """One workspace, and one part of a report.

    Args:
        title: heading.
        filter: which runs, as wandb-workspaces writes it: `Metric('Group') == 'vluer'`.
        folders: where local runs are, as patterns below the working directory; runs are found below them.
        sections: by their headings.
        group_by: key of the run's configuration by which wandb draws one line with its spread.
        max_runs: of a panel, the newest first.
    """

    title: str
    filter: str
    folders: list[str]
    sections: dict[str, Section]
    group_by: str | None = None
    max_runs: int = 24

    def __post_init__(self) -> None:
        if self.max_runs < 1:
            raise ValueError(f"max_runs: expected at least 1, got {self.max_runs}")
