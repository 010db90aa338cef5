"""Backbones: one interface, and each family of diffusion models behind it."""

from luve_lightning.models.backbones.base import (
    Backbone,
    Denoiser,
    Place,
    Recompute,
    Schedule,
)
from luve_lightning.models.backbones.finding import family_named, family_of, load_backbone
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
    "family_named",
    "family_of",
    "load_backbone",
]
