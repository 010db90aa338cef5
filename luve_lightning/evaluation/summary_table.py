"""The table of an evaluation, before it is text."""

from __future__ import annotations

from dataclasses import dataclass, field

from luve_lightning.evaluation.bootstrap import Interval
from luve_lightning.evaluation.measures import Measure
from luve_lightning.evaluation.runner import Problem


@dataclass(frozen=True)
class Difference:
    """One method minus another on the videos that both have.

    Attributes:
        metric: the column.
        first: a method.
        second: the method that is subtracted from it.
        interval: of the difference; 0 outside of it means that they differ.
    """

    metric: str
    first: str
    second: str
    interval: Interval


@dataclass(frozen=True)
class Resampling:
    """How intervals are made.

    Attributes:
        seed: of the draws.
        replicates: draws for means.
        frechet_replicates: draws for Fréchet distances, each of which decomposes a matrix.
    """

    seed: int = 0
    replicates: int = 1000
    frechet_replicates: int = 200

    def __post_init__(self) -> None:
        if self.seed < 0 or min(self.replicates, self.frechet_replicates) < 1:
            raise ValueError(
                f"expected seed >= 0, replicates >= 1 and frechet_replicates >= 1, got {self.seed}, "
                f"{self.replicates} and {self.frechet_replicates}"
            )


@dataclass
class Summary:
    """The table.

    Attributes:
        intervals: by metric, then method; a metric that has no result for a method is not there.
        differences: of the pairs asked for.
        problems: results that could not be put together.
        measures: the columns, in order; those of the results and what is computed of them.
    """

    measures: list[Measure]

    intervals: dict[str, dict[str, Interval]] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
