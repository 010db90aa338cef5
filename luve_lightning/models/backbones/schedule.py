"""Noise levels and time steps: a backbone's own scheduler, and the Euler steps of DiffSynth-Studio beside it."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from luve_lightning.functional.noise_bands import timestep_of_sigma

Sampler = Literal["backbone", "euler"]
"""The backbone's own scheduler (UniPC in Wan2.1's folders), or `FlowMatchLinearEuler`."""

# Options of diffusers' schedulers that put the noise levels elsewhere, whatever the shift.
_INSTEAD_OF_SHIFT = ("use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def check_sampler(sampler: str) -> None:
    """Refuse an unknown sampler.

    Raises:
        ValueError: names the known ones.
    """
    if sampler not in (known := get_args(Sampler)):
        raise ValueError(f"sampler: expected one of {', '.join(known)}, got {sampler!r}")


class Schedule:
    """Noise levels and time steps of a diffusers scheduler for flow matching.

    Args:
        scheduler: has `sigmas`, `timesteps`, `set_timesteps`, `set_begin_index` and `step`, like diffusers'; a
            pipeline holds and saves it.
        backbone: its origin, for messages.

    Raises:
        ValueError: when it is not for flow matching, like a `scheduler_config.json` without values.
    """

    remembered: ClassVar[int] = 0
    """Earlier velocities that a step looks back on."""
    timestep_dtype: ClassVar[torch.dtype | None] = None
    """Dtype to which the transformer's timesteps are rounded; None leaves them as they are."""

    def __init__(self, scheduler: Any, backbone: str | Path = "") -> None:
        if not (scheduler.config.get("use_flow_sigmas") or type(scheduler).__name__.startswith("FlowMatch")):
            raise ValueError(
                f"backbone {backbone}: its scheduler/ is {type(scheduler).__name__} without use_flow_sigmas; expected "
                "one of flow matching"
            )
        self.scheduler = scheduler

    @property
    def shift(self) -> float:
        """Shift towards more noise, see `functional.noise_bands.shift_sigma`; 1 changes nothing."""
        return float(self.scheduler.config.get(self._shift_key) or 1.0)

    def shifted(self, shift: float) -> Schedule:
        """A copy of the schedule with another shift.

        Raises:
            ValueError: for a shift that is not positive, or one that the scheduler would ignore.
        """
        if not 0 < shift < float("inf"):
            raise ValueError(f"shift: expected a number greater than 0, got {shift}")
        self._check_heeds_shift()
        return self._with(shift)

    def sampled_by(self, sampler: Sampler, shift: float | None = None) -> Schedule:
        """The schedule by which a sampler steps; see `shifted`.

        Args:
            sampler: see Sampler.
            shift: its shift; None keeps this one's.

        Raises:
            ValueError: for an unknown sampler, a shift that is impossible, and where there is none.
        """
        check_sampler(sampler)
        if sampler == "backbone":
            return self if shift is None else self.shifted(shift)
        if shift is None:
            self._check_heeds_shift()  # or its configuration may give one that is not used
        start = EulerSchedule(FlowMatchLinearEuler(num_train_timesteps=self.train_timesteps, shift=self.shift))
        return start if shift is None else start.shifted(shift)

    def steps(self, count: int) -> list[tuple[float, float]]:
        """Timestep and sigma of each of `count` sampling steps; the scheduler is unchanged."""
        scheduler = deepcopy(self.scheduler)
        scheduler.set_timesteps(count)
        # Not strict: the sigmas end at 0.
        return list(zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False))

    @property
    def train_timesteps(self) -> int:
        """The timestep of sigma 1."""
        return int(self.scheduler.config.num_train_timesteps)

    def timestep_of(self, sigma: Tensor) -> Tensor:
        """The transformer's timestep at a sigma; a sampler's own may be rounded."""
        return timestep_of_sigma(sigma, self.train_timesteps)

    @property
    def _shift_key(self) -> str:
        return "flow_shift" if "flow_shift" in self.scheduler.config else "shift"

    def _with(self, shift: float) -> Schedule:
        return type(self)(type(self.scheduler).from_config(self.scheduler.config, **{self._shift_key: shift}))

    def _check_heeds_shift(self) -> None:
        """Refuse a scheduler whose noise levels do not depend on the shift."""
        config = self.scheduler.config
        given = [key for key in _INSTEAD_OF_SHIFT if config.get(key)]
        if self._shift_key not in config:
            why = "has neither flow_shift nor shift"
        elif given:
            why = f"does not follow it with {given[0]}"
        elif self._with(2.0).steps(4) == self._with(4.0).steps(4):
            why = "has the same noise levels at any"
        else:
            return
        raise ValueError(
            f"shift: the backbone's scheduler, {type(self.scheduler).__name__}, {why}; expected one that follows it, "
            "such as UniPCMultistepScheduler with flow_shift, or no shift"
        )


class FlowMatchLinearEuler(FlowMatchEulerDiscreteScheduler):
    """Euler steps from sigma 1 on N equal parts of the unshifted schedule, as DiffSynth-Studio samples Wan.

    Step i of N begins at shift(1 - i / N). diffusers' class alone would space its N levels otherwise and shift the last
    twice; here it is given the levels. Latents stay float32, whatever the velocities are.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Prepare a run of some steps; see diffusers' schedulers."""
        levels = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float32)[:-1]
        super().set_timesteps(sigmas=levels.tolist(), device=device)

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
        """One step; see diffusers' schedulers."""
        return super().step(model_output.float(), timestep, sample, **options)


class EulerSchedule(Schedule):
    """Steps of `FlowMatchLinearEuler`, with the transformer's timesteps in bfloat16, as in DiffSynth-Studio.

    Experts are chosen by the timesteps before they are rounded.
    """

    timestep_dtype = torch.bfloat16
