"""A tiny module that can be exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.helpers.tiny import TinyModule


class ExportingModule(TinyModule):
    """TinyModule with an export of one file."""

    def export(self, folder: Path, datamodule: Any) -> None:
        del datamodule
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "weights.pt")
