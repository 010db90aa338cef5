"""LightningDataModules."""

from luve_lightning.datamodules.clips import ClipsDataModule
from luve_lightning.datamodules.latent_pairs import LatentPairsDataModule

__all__ = ["ClipsDataModule", "LatentPairsDataModule"]
