"""The LightningModules."""

from luve_lightning.tasks.backbone import AutoencoderTask, BackboneTask
from luve_lightning.tasks.base import TrainingTask
from luve_lightning.tasks.expert import AdaptationTask, ExpertTask
from luve_lightning.tasks.flow import FlowMatchingTask
from luve_lightning.tasks.vluer import VLUerTask

__all__ = [
    "AdaptationTask",
    "AutoencoderTask",
    "BackboneTask",
    "ExpertTask",
    "FlowMatchingTask",
    "TrainingTask",
    "VLUerTask",
]
