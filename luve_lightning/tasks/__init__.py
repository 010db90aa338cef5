"""The LightningModules."""

from luve_lightning.tasks.adaptation import AdaptationTask
from luve_lightning.tasks.autoencoder import AutoencoderTask
from luve_lightning.tasks.backbone import BackboneTask
from luve_lightning.tasks.base import TrainingTask
from luve_lightning.tasks.expert import ExpertTask
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
