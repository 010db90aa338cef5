"""LaVie's super-resolution as a refinement: from noise, beside the upsampled latents."""

from __future__ import annotations

from dataclasses import dataclass
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
        device, generator = pipeline._execution_device, run.options.get("generator")
        run.schedule.scheduler.set_timesteps(run.steps, device=device)
        noise, other = (randn_tensor(latents.shape, generator, device, torch.float32) for _ in range(2))
        strength = torch.tensor(self.strength, device=device)
        condition = noise_augmented(latents.to(device, torch.float32), other, strength)
        model = pipeline.refinement_transformer
        return denoised(pipeline, "refined", model, noise, run, choose=choose, condition=condition)

    def steps(self, steps: int, skip: int) -> int:
        """See Refinement."""
        return steps

    def planned(self, motion: Size3d, size: Size3d, steps: int, skip: int) -> list[RefiningSteps]:
        """See Refinement."""
        return [RefiningSteps(size, steps, 0)]


METHODS = {"lavie": ConcatenatedDiffusion}
