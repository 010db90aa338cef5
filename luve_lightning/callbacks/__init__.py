"""Lightning callbacks."""

from luve_lightning.callbacks.ema import EMA
from luve_lightning.callbacks.export import ExportVAE

__all__ = ["EMA", "ExportVAE"]
