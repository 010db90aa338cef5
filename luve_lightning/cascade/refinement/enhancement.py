"""Refinements whose refiner was trained for them: FlashVideo's flow, Waver's, and LaVie's super-resolution."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from luve_lightning.cascade.refinement import Refinement, RefiningSteps
from luve_lightning.cascade.run import RefinementRun, Run
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.functional.noise_bands import noise_augmented, noised


@dataclass(frozen=True)
class FlowFromLow(Refinement):
    """Follows a learnt flow from its end, where sigma is 1, by Euler steps to sigma 0.

    The end is upsampled latents with noise, as `start` mixes them. The cascade's steps and skipped steps do not matter.

    Attributes:
        evaluations: Euler steps, >= 1.
        strength: of the noise, in [0, 1].
    """

    evaluations: int
    strength: float

    def __post_init__(self) -> None:
        check_fractions(self.evaluations, strength=self.strength)

    @abstractmethod
    def start(self, latents: Tensor, noise: Tensor, strength: Tensor) -> Tensor:
        """Upsampled latents with noise of a strength."""

    def shift_of(self, run: Run) -> float:
        """Shift of the schedule: the run's."""
        return run.schedule.shift

    def refined(self, given: RefinementRun) -> Tensor:
        """See Refinement."""
        schedule = given.pipeline.schedule(self.shift_of(given.run), "euler")
        schedule.scheduler.set_timesteps(self.evaluations, device=given.device)
        given = replace(given, run=replace(given.run, schedule=schedule, steps=self.evaluations))
        latents, strength = given.latents.to(given.device, torch.float32), torch.tensor(self.strength)
        return given.denoised(self.start(latents, given.noise(), strength.to(given.device)))

    def steps(self, steps: int, skip: int) -> int:
        """See Refinement."""
        return self.evaluations

    def planned(self, motion: Size3d, size: Size3d, steps: int, skip: int) -> list[RefiningSteps]:
        """See Refinement."""
        return [RefiningSteps(size, self.evaluations, 0)]


@dataclass(frozen=True)
class FlashVideoFlow(FlowFromLow):
    """FlashVideo (arXiv 2502.05179): the flow that `tasks.FlashVideoTask` trains.

    It starts from sqrt(1 - s^2) * upsampled + s * noise. The schedule is its own.

    Defaults are those of the paper and its released code (s is step 675 of its DDPM schedule), but for guidance: the
    cascade's is used, where the code takes 10 to 13. See FlashVideoTask for what is adapted and left out.

    Attributes:
        evaluations: Euler steps, >= 1.
        strength: s, in [0, 1].
        shift: shift of the schedule, > 0.
    """

    evaluations: int = 4
    strength: float = 0.9645
    shift: float = 2.5

    trained: ClassVar[str] = "flashvideo"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shift > 0:
            raise ValueError(f"shift: expected a number greater than 0, got {self.shift}")

    def start(self, latents: Tensor, noise: Tensor, strength: Tensor) -> Tensor:
        """See FlowFromLow."""
        return noise_augmented(latents, noise, strength)

    def shift_of(self, run: Run) -> float:
        """Its own."""
        return self.shift


@dataclass(frozen=True)
class WaverFlow(FlowFromLow):
    """Waver's cascade refiner (arXiv 2508.15761): the flow that `tasks.WaverTask` trains.

    It starts from (1 - w) * upsampled + w * noise, with the run's shift and guidance. Attention within windows comes
    with the refiner. See WaverTask for what is adapted and left out.

    Attributes:
        evaluations: Euler steps, >= 1. The default is ours: fewer than the 50 of the other stages.
        strength: w, in [0, 1]; the middle of those that the paper trains with.
    """

    evaluations: int = 20
    strength: float = 0.9

    trained: ClassVar[str] = "waver"

    def start(self, latents: Tensor, noise: Tensor, strength: Tensor) -> Tensor:
        """See FlowFromLow."""
        return noised(latents, noise, strength)


@dataclass(frozen=True)
class ConcatenatedDiffusion(Refinement):
    """LaVie's super-resolution (arXiv 2309.15103), for the refiner that `tasks.LaVieTask` trains.

    All steps of the cascade's schedule, from pure noise, and in each the refiner also takes
    sqrt(1 - s^2) * upsampled + s * noise', the same every time, in channels of its own. Skipped steps do not matter.
    See LaVieTask for what is adapted and left out.

    Attributes:
        strength: s, in [0, 1]; 0.1 is level 50 of the image upscaler that LaVie's starts from, as its code takes.
    """

    strength: float = 0.1

    trained: ClassVar[str] = "lavie"

    def __post_init__(self) -> None:
        check_fractions(strength=self.strength)

    def refined(self, given: RefinementRun) -> Tensor:
        """See Refinement."""
        given.run.schedule.scheduler.set_timesteps(given.run.steps, device=given.device)
        noise, other = given.noise(), given.noise()
        strength = torch.tensor(self.strength, device=given.device)
        condition = noise_augmented(given.latents.to(given.device, torch.float32), other, strength)
        return given.denoised(noise, condition=condition)

    def steps(self, steps: int, skip: int) -> int:
        """See Refinement."""
        return steps

    def planned(self, motion: Size3d, size: Size3d, steps: int, skip: int) -> list[RefiningSteps]:
        """See Refinement."""
        return [RefiningSteps(size, steps, 0)]


def check_fractions(evaluations: int = 1, **fractions: float) -> None:
    """Refuse less than one evaluation, and what is outside [0, 1], by name.

    Raises:
        ValueError: names it.
    """
    if evaluations < 1:
        raise ValueError(f"evaluations: expected at least 1, got {evaluations}")
    for name, value in fractions.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {value}")


METHODS = {"flashvideo": FlashVideoFlow, "lavie": ConcatenatedDiffusion, "waver": WaverFlow}
