"""The configuration of an expert: its place, rank, filter and noise band."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import get_args

from luve_lightning.functional.frequency import FrequencyFilter
from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.models.backbones import Place


@dataclass(frozen=True)
class ExpertConfig:
    """A low-rank expert around whole modules: y = module(x) + alpha / rank * B(A(filter(x))).

    LuVe's (arXiv 2602.11564) low-frequency expert has place "attention", a low-pass filter and the band above its
    t_switch; the high-frequency expert "feed_forward", a high-pass and the band below. The paper publishes neither
    rank nor alpha nor filter.

    Attributes:
        place: module of each block, one or several: self-attention, cross-attention, feed-forward.
        rank: columns of A, >= 1.
        alpha: the correction is scaled by alpha / rank; greater than 0.
        filter: filter of the module's input before A; None is a plain LoRA.
        band: sigmas for which `route_by_sigma` chooses the expert.
    """

    place: Place | tuple[Place, ...]
    rank: int = 32
    alpha: float = 32.0
    filter: FrequencyFilter | None = None
    band: SigmaBand = field(default_factory=SigmaBand)

    def __post_init__(self) -> None:
        if not isinstance(self.place, str):
            object.__setattr__(self, "place", tuple(self.place))  # configuration files give lists
        if (
            not self.places
            or len(set(self.places)) < len(self.places)
            or not set(self.places) <= set(get_args(Place))
        ):
            raise ValueError(
                f"expert place {self.place!r}: expected one or more of {', '.join(get_args(Place))}, each once"
            )
        if int(self.rank) != self.rank or self.rank < 1:
            raise ValueError(f"expert rank {self.rank}: expected an integer >= 1")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"expert alpha {self.alpha}: expected a finite number > 0")

    @property
    def places(self) -> tuple[Place, ...]:
        """`place` as a tuple."""
        return (self.place,) if isinstance(self.place, str) else self.place
