"""Flows from upsampled latents with noise to the clean ones: FlashVideo's second stage and Waver's refiner."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from luve_lightning.cascade.refinement import Refinement, RefiningSteps, check_fractions
from luve_lightning.cascade.run import Chooser, Run, denoised
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.functional.noise_bands import noise_augmented, noised

if TYPE_CHECKING:
    from luve_lightning.cascade.pipeline import LuVePipeline


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

    def __call__(
        self,
        pipeline: LuVePipeline,
        latents: Tensor,
        skip: int,
        choose: Chooser,
        run: Run,
        motion: Tensor | None = None,
    ) -> Tensor:
        """See Refinement."""
        del skip, motion
        device = pipeline._execution_device
        run = replace(run, schedule=pipeline.schedule(self.shift_of(run), "euler"), steps=self.evaluations)
        run.schedule.scheduler.set_timesteps(run.steps, device=device)
        noise = randn_tensor(latents.shape, run.options.get("generator"), device, torch.float32)
        start = self.start(latents.to(device, torch.float32), noise, torch.tensor(self.strength, device=device))
        return denoised(pipeline, "refined", pipeline.refinement_transformer, start, run, choose=choose)

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


METHODS = {"flashvideo": FlashVideoFlow, "waver": WaverFlow}
