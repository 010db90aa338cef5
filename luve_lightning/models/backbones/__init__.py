"""Backbones: one interface, and each family of diffusion models behind it."""

from luve_lightning.models.backbones.base import Backbone, Schedule
from luve_lightning.models.backbones.denoiser import Denoiser, Place, Recompute
from luve_lightning.models.backbones.finding import denoiser_of, family_named, family_of, load_backbone
from luve_lightning.models.backbones.latents import LatentSpace
from luve_lightning.models.backbones.sizes import SizeRules
from luve_lightning.models.backbones.text import CutText, CutTextWarning, TextConditioner

__all__ = [
    "Backbone",
    "CutText",
    "CutTextWarning",
    "Denoiser",
    "LatentSpace",
    "Place",
    "Recompute",
    "Schedule",
    "SizeRules",
    "TextConditioner",
    "denoiser_of",
    "family_named",
    "family_of",
    "load_backbone",
]
