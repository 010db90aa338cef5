"""The LightningModules."""

from luve_lightning.tasks.autoencoder import AutoencoderTask
from luve_lightning.tasks.base import TrainingTask
from luve_lightning.tasks.vluer import VLUerTask

__all__ = ["AutoencoderTask", "TrainingTask", "VLUerTask"]
