"""LuVe's own refinement: noise of a middle level, removed again at full size by the experts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from luve_lightning.cascade.refinement import Refinement
from luve_lightning.cascade.run import RefinementRun


@dataclass(frozen=True)
class ContentRefinement(Refinement):
    """High-resolution content refinement, LuVe's third stage (arXiv 2602.11564): see `cascade.stages.refine`.

    With sigma the level after the skipped steps, (1 - sigma) * latents + sigma * noise is denoised from there.
    """

    def refined(self, given: RefinementRun) -> Tensor:
        """See Refinement."""
        x, _ = given.renoised()
        return given.denoised(x, given.skip)


METHODS = {"luve": ContentRefinement}
