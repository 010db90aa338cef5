"""Pipelines in diffusers' manner."""

from luve_lightning.pipelines.vluer import VLUerPipeline, VLUerPipelineOutput

__all__ = ["VLUerPipeline", "VLUerPipelineOutput"]
