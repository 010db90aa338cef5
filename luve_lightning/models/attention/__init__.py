"""Attentions that take the place of a transformer's own self-attention, one a file."""

from luve_lightning.models.attention.base import Attention

__all__ = ["Attention"]
