"""Backbones: one interface, and each family of diffusion models behind it."""

from luve_lightning.models.backbones.base import Backbone, CutText, CutTextWarning, TextConditioner
from luve_lightning.models.backbones.denoiser import Denoiser, Place
from luve_lightning.models.backbones.finding import (
    denoiser_of,
    family_named,
    family_of,
    latent_space_of,
    load_backbone,
    recognise,
)
from luve_lightning.models.backbones.latents import LatentSpace, SizeRules
from luve_lightning.models.backbones.recompute import Recompute
from luve_lightning.models.backbones.schedule import Sampler, Schedule, check_sampler

__all__ = [
    "Backbone",
    "CutText",
    "CutTextWarning",
    "Denoiser",
    "LatentSpace",
    "Place",
    "Recompute",
    "Sampler",
    "Schedule",
    "SizeRules",
    "TextConditioner",
    "check_sampler",
    "denoiser_of",
    "family_named",
    "family_of",
    "latent_space_of",
    "load_backbone",
    "recognise",
]
