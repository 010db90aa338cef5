"""FlashVideo's second stage as a refinement: few steps from noised upsampled latents to the clean ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from luve_lightning.cascade.refinement import Refinement, RefiningSteps, check_fractions
from luve_lightning.cascade.run import Chooser, Run, denoised
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.functional.noise_bands import noise_augmented

if TYPE_CHECKING:
    from luve_lightning.cascade.pipeline import LuVePipeline


@dataclass(frozen=True)
class LowToHighFlow(Refinement):
    """FlashVideo (arXiv 2502.05179): the flow that `tasks.FlashVideoTask` trains, followed from its end.

    It starts from sqrt(1 - s^2) * upsampled + s * noise, where the flow's sigma is 1, and takes Euler steps of the
    learnt velocity to sigma 0. The schedule is its own; the cascade's steps, skipped steps and shift do not matter.

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
        check_fractions(self.evaluations, strength=self.strength)
        if not self.shift > 0:
            raise ValueError(f"shift: expected a number greater than 0, got {self.shift}")

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
        run = replace(run, schedule=pipeline.schedule(self.shift, "euler"), steps=self.evaluations)
        run.schedule.scheduler.set_timesteps(run.steps, device=device)
        noise = randn_tensor(latents.shape, run.options.get("generator"), device, torch.float32)
        start = noise_augmented(latents.to(device, torch.float32), noise, torch.tensor(self.strength, device=device))
        return denoised(pipeline, "refined", pipeline.refinement_transformer, start, run, choose=choose)

    def steps(self, steps: int, skip: int) -> int:
        """See Refinement."""
        return self.evaluations

    def planned(self, motion: Size3d, size: Size3d, steps: int, skip: int) -> list[RefiningSteps]:
        """See Refinement."""
        return [RefiningSteps(size, self.evaluations, 0)]


METHODS = {"flashvideo": LowToHighFlow}
