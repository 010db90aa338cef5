"""Which expert acts at which step of denoising: by its band of noise levels, or by the spectrum predicted so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import combinations
from typing import Any

from torch import Tensor

from luve_lightning.cascade.options import SpectrumSwitch
from luve_lightning.functional.noise_bands import SigmaBand, sigma_of_timestep
from luve_lightning.functional.spectra import band_power, radial_spectrum
from luve_lightning.models.experts import activate, expert_names
from luve_lightning.models.experts.routing import state_of

Experts = str | Collection[str]
"""Either "all" or "none", the name of an expert, or several names."""
_NEAREST = 1e-6  # of sigma to 0 and 1, where the logarithm ends; UniPC's first sigma is that near to 1


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
    switch: float | SpectrumSwitch | None = None,
    train_timesteps: int = 1000,
) -> Callable[[float], str | None] | None:
    """A function from the scheduler's timestep to the active expert, or None where no expert is used.

    An expert is active where its band contains timestep / `train_timesteps`. LuVe's (arXiv 2602.11564) bands meet
    at sigma 0.875: the low-frequency expert from timestep 875 up, the high-frequency one below. With 50 steps,
    shift 5 and the first 10 skipped these are 11 and 29 steps.

    Args:
        transformer: transformer with experts.
        experts: which of them to use.
        switch: sigma at which the bands should meet; None uses the bands that the experts were saved with, a
            SpectrumSwitch decides for each run of `denoise` by what it predicts.
        train_timesteps: the scheduler's `num_train_timesteps`.

    Raises:
        ValueError: for an unknown expert, experts whose bands overlap, or a switch that no band can take; for a
            SpectrumSwitch without experts, or with a cache from step to step.
    """
    names = selected_experts(transformer, experts)
    spectrum = switch if isinstance(switch, SpectrumSwitch) else None
    if spectrum is not None and not names:
        raise ValueError("switch spectrum: there are no experts between which to hand over")
    if spectrum is not None and transformer.is_cache_enabled:
        raise ValueError(spectrum.no_cache)
    if not names:
        return None
    configs = state_of(transformer).configs
    moved = 0.5 if isinstance(switch, SpectrumSwitch) else switch  # anywhere: one band is above it, one below
    bands = {name: moved_band(name, configs[name].band, moved) for name in names}
    for (a, first), (b, second) in combinations(bands.items(), 2):
        if max(first.low, second.low) < min(first.high, second.high):
            raise ValueError(
                f"experts {a} and {b}: their bands of sigma, {first.low:g} to {first.high:g} and {second.low:g} to "
                f"{second.high:g}, overlap; name one of them"
            )

    if spectrum is not None:
        before, after = (
            next((n for n, band in bands.items() if (band.low > 0) == high), None) for high in (True, False)
        )
        return SpectrumChooser(spectrum, before, after, train_timesteps)

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


class SpectrumChooser:
    """The expert at a timestep, by what the steps before have predicted.

    Called like any chooser. `denoise` calls `begin` before its first step and `see` after each prediction. Videos of
    one batch share a transformer and its expert, so it hands over when all have settled.

    Args:
        switch: when the low band has settled.
        before: expert until then; None is none.
        after: expert from then on; None is none.
        train_timesteps: the scheduler's `num_train_timesteps`.
    """

    def __init__(
        self, switch: SpectrumSwitch, before: str | None, after: str | None, train_timesteps: int = 1000
    ) -> None:
        self.switch, self.before, self.after, self.train_timesteps = switch, before, after, train_timesteps
        self.begin()

    def begin(self) -> None:
        """Forget an earlier run."""
        self._settled = 0
        self._handed_over = False
        self._last: tuple[float, Tensor] | None = None

    def __call__(self, timestep: float) -> str | None:
        """The expert in force at a timestep; once it has handed over, the later one."""
        sigma = sigma_of_timestep(float(timestep), self.train_timesteps)
        settled = self._settled >= self.switch.patience and sigma <= self.switch.high
        self._handed_over |= settled or sigma <= self.switch.low
        return self.after if self._handed_over else self.before

    def see(self, sigma: float, clean: Tensor) -> None:
        """Take in a step's prediction.

        Args:
            sigma: noise level of the step's input.
            clean: predicted clean latents, B x C x t x h x w.

        Raises:
            ValueError: latents too small for the band.
        """
        if self._handed_over:
            self._last = None
            return
        clean = clean.float()
        if self._last is not None:
            gained = _log_ratio(sigma) - _log_ratio(self._last[0])
            changed = (self._power(clean - self._last[1]) / self._power(clean)).sqrt().max() / gained
            self._settled = self._settled + 1 if float(changed) <= self.switch.rate else 0
        self._last = sigma, clean

    def _power(self, latents: Tensor) -> Tensor:
        """Power of each video's low band, shape (B,)."""
        return band_power(radial_spectrum(latents), (0.0, self.switch.band))[..., 0].mean(1)


def _log_ratio(sigma: float) -> float:
    sigma = min(max(sigma, _NEAREST), 1 - _NEAREST)
    return math.log((1 - sigma) / sigma)


def switch_expert(transformer: Any, name: str | None) -> None:
    """Activate one expert, or none, and drop a step-to-step cache, which another model filled."""
    if expert_names(transformer):
        activate(transformer, name)
    if transformer.is_cache_enabled:
        transformer._reset_stateful_cache()  # as diffusers' pipelines do at the end of a run
