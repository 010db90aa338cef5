"""The LightningModules."""

from luve_lightning.tasks.backbone import AutoencoderTask, BackboneTask
from luve_lightning.tasks.base import TrainingTask
from luve_lightning.tasks.distillation import VLUerDistillationTask
from luve_lightning.tasks.enhancement import EnhancementTask, FlashVideoTask, LaVieTask, WaverTask
from luve_lightning.tasks.expert import AdaptationTask, ExpertTask
from luve_lightning.tasks.flow import FlowMatchingTask
from luve_lightning.tasks.recogniser import RecogniserTask
from luve_lightning.tasks.vluer import VLUerTask

__all__ = [
    "AdaptationTask",
    "AutoencoderTask",
    "BackboneTask",
    "EnhancementTask",
    "ExpertTask",
    "FlashVideoTask",
    "FlowMatchingTask",
    "LaVieTask",
    "RecogniserTask",
    "TrainingTask",
    "VLUerDistillationTask",
    "VLUerTask",
    "WaverTask",
]
