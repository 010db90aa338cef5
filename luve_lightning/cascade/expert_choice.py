"""Which expert is active at which step."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import combinations
from typing import Any

from luve_lightning.functional.flow_matching import sigma_of_timestep
from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.models.experts import expert_names
from luve_lightning.models.experts.routing import state_of

Experts = str | Collection[str]
"""Either "all" or "none", the name of an expert, or several names."""


def selected_experts(transformer: Any, experts: Experts) -> list[str]:
    """The names of the selected experts.

    Raises:
        ValueError: for a name that the transformer does not have.
    """
    known = expert_names(transformer)
    if experts == "none":
        return []
    if experts == "all":
        return known
    names = [experts] if isinstance(experts, str) else list(experts)
    for name in names:
        if name not in known:
            raise ValueError(
                f"experts: no expert {name!r}: expected all, none or some of {', '.join(known) or '(there are none)'}"
            )
    return names


def expert_chooser(
    transformer: Any,
    experts: Experts = "all",
    switch: float | None = None,
    train_timesteps: int = 1000,
) -> Callable[[float], str | None] | None:
    """A function from the scheduler's timestep to the active expert, or None where no expert is used.

    An expert is active where its band contains timestep / `train_timesteps`. LuVe's (arXiv 2602.11564) bands meet
    at sigma 0.875: the low-frequency expert from timestep 875 up, the high-frequency one below. With 50 steps,
    shift 5 and the first 10 skipped these are 11 and 29 steps.

    Args:
        transformer: transformer with experts.
        experts: which of them to use.
        switch: sigma at which the bands should meet; None uses the bands that the experts were saved with.
        train_timesteps: the scheduler's `num_train_timesteps`.

    Raises:
        ValueError: for an unknown expert, experts whose bands overlap, or a switch that no band can take.
    """
    names = selected_experts(transformer, experts)
    if not names:
        return None
    configs = state_of(transformer).configs
    bands = {name: moved_band(name, configs[name].band, switch) for name in names}
    for (a, first), (b, second) in combinations(bands.items(), 2):
        if max(first.low, second.low) < min(first.high, second.high):
            raise ValueError(
                f"experts {a} and {b}: their bands of sigma, {first.low:g} to {first.high:g} and {second.low:g} to "
                f"{second.high:g}, overlap; name one of them"
            )

    def choose(timestep: float) -> str | None:
        sigma = float(sigma_of_timestep(float(timestep), train_timesteps))
        return next((name for name, band in bands.items() if band.contains(sigma)), None)

    return choose


def moved_band(name: str, band: SigmaBand, switch: float | None) -> SigmaBand:
    """A band with its inner bound moved to `switch`: the upper one of [low, 1], the lower one of [0, high).

    Raises:
        ValueError: for a switch outside (0, 1), or a band with no or two inner bounds.
    """
    if switch is None:
        return band
    if not 0 < switch < 1:
        raise ValueError(f"switch {switch}: expected a sigma between 0 and 1")
    if (band.low > 0) == (band.high < 1):
        raise ValueError(
            f"switch {switch}: expert {name} has the band {band.low:g} to {band.high:g}, where it has no place"
        )
    return replace(band, low=switch) if band.low > 0 else replace(band, high=switch)
