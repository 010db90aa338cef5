"""LuVe's own refinement: noise of a middle level, removed again at full size by the experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from luve_lightning.cascade.refinement import Refinement
from luve_lightning.cascade.run import Chooser, Run, denoised, renoised

if TYPE_CHECKING:
    from luve_lightning.cascade.pipeline import LuVePipeline


@dataclass(frozen=True)
class ContentRefinement(Refinement):
    """High-resolution content refinement, LuVe's third stage (arXiv 2602.11564): see `cascade.stages.refine`.

    With sigma the level after the skipped steps, (1 - sigma) * latents + sigma * noise is denoised from there.
    """

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
        del motion
        if skip == run.steps:
            return latents
        x, _ = renoised(pipeline, latents, skip, run)
        return denoised(pipeline, "refined", pipeline.refinement_transformer, x, run, skip, choose)


METHODS = {"luve": ContentRefinement}
