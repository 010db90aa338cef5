"""Pipelines in diffusers' manner."""

from luve_lightning.pipelines.denoise import Guidance
from luve_lightning.pipelines.luve import LuVePipeline
from luve_lightning.pipelines.luve_run import ExpertUse, LuVePipelineOutput
from luve_lightning.pipelines.luve_speed import SpeedOptions

__all__ = [
    "ExpertUse",
    "Guidance",
    "LuVePipeline",
    "LuVePipelineOutput",
    "SpeedOptions",
]
