"""A pixel transform that writes down what passes through it."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from luve_lightning.data.variants import PixelTransform


class Recording(PixelTransform):
    """Darkens videos and appends one line a call, "process number-of-videos", to a file.

    Args:
        log: the file.
        amount: what the pixels are multiplied by.
    """

    def __init__(self, log: Path, amount: float = 0.5) -> None:
        super().__init__()
        self.log, self.amount = log, amount

    def label(self) -> str:
        return f"amount {self.amount}"

    def forward(self, video: Tensor) -> Tensor:
        with self.log.open("a") as stream:
            stream.write(f"{os.getpid()} {len(video)}\n")
        return video * self.amount
