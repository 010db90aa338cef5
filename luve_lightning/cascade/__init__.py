"""Pipelines in diffusers' manner."""

from luve_lightning.cascade.luve import LuVePipeline
from luve_lightning.cascade.luve_run import ExpertUse, LuVePipelineOutput
from luve_lightning.cascade.luve_speed import SpeedOptions
from luve_lightning.cascade.options import CascadeOptions, Guidance

__all__ = [
    "CascadeOptions",
    "ExpertUse",
    "Guidance",
    "LuVePipeline",
    "LuVePipelineOutput",
    "SpeedOptions",
]
