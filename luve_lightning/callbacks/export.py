"""Writes the trained model in its own format when training ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from luve_lightning.callbacks.ema import averaged_weights


class ExportVAE(L.Callback):
    """Saves the averaged VAE as a diffusers folder with measured latent statistics.

    Args:
        output: backbone folder; the VAE goes to `output/vae`.
    """

    def __init__(self, output: Path) -> None:
        self.output = Path(output)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Measure the latents of the training split and save."""
        if not trainer.is_global_zero:
            return
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        with averaged_weights(trainer, pl_module):
            pl_module.export(self.output, datamodule.statistics_dataloader())
