"""Writes the trained model in its own format when training ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from luve_lightning.callbacks.ema import averaged_weights


class Export(L.Callback):
    """Saves the averaged weights with the task's own `export(folder, datamodule)` when training ends, however it ends.

    Args:
        output: folder to write, for example one that `VLUer.from_pretrained` reads.
    """

    def __init__(self, output: Path) -> None:
        self.output = Path(output)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save on the first process; with the others' help where a task says `collective_export`."""
        if not trainer.is_global_zero and not getattr(pl_module, "collective_export", False):
            return
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        with averaged_weights(trainer, pl_module):
            pl_module.export(self.output, datamodule)
