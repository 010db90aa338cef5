"""What callbacks and evaluation need of a task: any LightningModule with these attributes will do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from luve_lightning.models.backbones import Denoiser, LatentSpace, TextConditioner
from luve_lightning.models.experts import ExpertConfig
from luve_lightning.models.vluer import BaseVLUer


@runtime_checkable
class Exporting(Protocol):
    """A trained model that saves itself in its own format; for `Export`.

    A task whose export needs every process sets `collective_export = True`.
    """

    def export(self, folder: Path, datamodule: Any) -> None:
        """Write into an existing folder."""


@runtime_checkable
class Denoising(Protocol):
    """Generates from caption embeddings; for `GeneratedVideos`.

    Attributes:
        transformer: a backbone's transformer, with or without experts.
        denoiser: the denoiser of it.
        shift: shift of the schedule that it was trained for.
        device: device of the transformer.
    """

    transformer: nn.Module
    denoiser: Denoiser
    shift: float
    device: torch.device

    def text(self, batch: dict[str, Any]) -> Tensor:
        """Caption embeddings of a batch, B x L x D."""


@runtime_checkable
class TextToVideo(Denoising, Protocol):
    """Generates from captions; for `DenoisingSpectra`.

    Attributes:
        text_encoder: embeds them.
        backbone: folder with the VAE whose latents it generates.
    """

    text_encoder: TextConditioner
    backbone: Path


@runtime_checkable
class Upsampling(Protocol):
    """Upsamples latents; for `UpsamplerComparison`, `SampleStrips` and `UpsampledVideos`.

    Attributes:
        net: the upsampler.
        codec: the latents' codec.
        device: device of both.
    """

    net: BaseVLUer
    codec: LatentSpace
    device: torch.device


@runtime_checkable
class ExpertComparison(Protocol):
    """Has compared an expert with its base in `trainer.test`; for `ExpertLosses`.

    Attributes:
        name: name of the expert.
        expert: configuration of the expert.
        comparison: mean loss without and with the expert, by clip.
    """

    name: str
    expert: ExpertConfig
    comparison: Mapping[str, tuple[float, float]]
