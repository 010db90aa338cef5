"""Pipelines in diffusers' manner."""

from luve_lightning.cascade.denoise import Guidance
from luve_lightning.cascade.luve import LuVePipeline
from luve_lightning.cascade.luve_run import ExpertUse, LuVePipelineOutput
from luve_lightning.cascade.luve_speed import SpeedOptions

__all__ = [
    "ExpertUse",
    "Guidance",
    "LuVePipeline",
    "LuVePipelineOutput",
    "SpeedOptions",
]
