"""The cascade: one pipeline, its options, and the jobs of `luve generate`."""

from luve_lightning.cascade.options import CascadeOptions, Guidance
from luve_lightning.cascade.pipeline import LuVePipeline
from luve_lightning.cascade.run import ExpertUse, LuVePipelineOutput
from luve_lightning.cascade.speed import SpeedOptions

__all__ = ["CascadeOptions", "ExpertUse", "Guidance", "LuVePipeline", "LuVePipelineOutput", "SpeedOptions"]
