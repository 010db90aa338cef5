"""Upsampling by a trained VLUer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from luve_lightning.cascade.upsampling import UpsamplingMethod, UpsamplingModels
from luve_lightning.functional.interpolation import Size3d


@dataclass(frozen=True)
class TrainedUpsampling(UpsamplingMethod):
    """Runs the video latent upsampler."""

    model: ClassVar[Literal["vluer"]] = "vluer"

    def __call__(self, latents: Tensor, size: Size3d, models: UpsamplingModels) -> Tensor:
        """See UpsamplingMethod.

        Raises:
            ValueError: there is no VLUer.
        """
        if models.vluer is None:
            raise ValueError("upsampling: there is no VLUer; upsample by latent or rgb, which need none")
        return models.vluer(latents, size)


METHODS = {"vluer": TrainedUpsampling()}
