"""Waver's refiner as a refinement: from a blend of upsampled latents and noise to the clean ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from luve_lightning.cascade.refinement import Refinement, RefiningSteps, check_fractions
from luve_lightning.cascade.run import Chooser, Run, denoised
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.functional.noise_bands import noised

if TYPE_CHECKING:
    from luve_lightning.cascade.pipeline import LuVePipeline


@dataclass(frozen=True)
class BlendedFlow(Refinement):
    """Waver's cascade refiner (arXiv 2508.15761): the flow that `tasks.WaverTask` trains, followed from its end.

    It starts from (1 - w) * upsampled + w * noise, where the flow's sigma is 1, and takes Euler steps of the learnt
    velocity to sigma 0, with the run's shift and guidance. Attention within windows comes with the refiner. The
    cascade's steps and skipped steps do not matter. See WaverTask for what is adapted and left out.

    Attributes:
        evaluations: Euler steps, >= 1. The default is ours: fewer than the 50 of the other stages.
        strength: w, in [0, 1]; the middle of those that the paper trains with.
    """

    evaluations: int = 20
    strength: float = 0.9

    trained: ClassVar[str] = "waver"

    def __post_init__(self) -> None:
        check_fractions(self.evaluations, strength=self.strength)

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
        run = replace(run, schedule=pipeline.schedule(run.schedule.shift, "euler"), steps=self.evaluations)
        run.schedule.scheduler.set_timesteps(run.steps, device=device)
        noise = randn_tensor(latents.shape, run.options.get("generator"), device, torch.float32)
        start = noised(latents.to(device, torch.float32), noise, torch.tensor(self.strength, device=device))
        return denoised(pipeline, "refined", pipeline.refinement_transformer, start, run, choose=choose)

    def steps(self, steps: int, skip: int) -> int:
        """See Refinement."""
        return self.evaluations

    def planned(self, motion: Size3d, size: Size3d, steps: int, skip: int) -> list[RefiningSteps]:
        """See Refinement."""
        return [RefiningSteps(size, self.evaluations, 0)]


METHODS = {"waver": BlendedFlow}
