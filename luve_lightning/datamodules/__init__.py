"""LightningDataModules."""

from luve_lightning.datamodules.caption_latents import CaptionLatentsDataModule
from luve_lightning.datamodules.clips import ClipsDataModule
from luve_lightning.datamodules.latent_pairs import LatentPairsDataModule
from luve_lightning.datamodules.painted_scenes import PaintedScenes

__all__ = ["CaptionLatentsDataModule", "ClipsDataModule", "LatentPairsDataModule", "PaintedScenes"]
