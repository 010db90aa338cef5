"""Latents of finished stages on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from luve_lightning.datasets.claimed_files import ClaimedFiles


class StageLatents:
    """Latents of finished stages, by what they depend on: a later run takes them instead of making them again.

    Args:
        root: the folder; made on the first write.
    """

    def __init__(self, root: Path) -> None:
        self._files = ClaimedFiles(root)
        self._files.clean()

    @staticmethod
    def digest(recipe: Mapping[str, Any]) -> str:
        """The name of a stage's latents: sha256 of all that they depend on."""
        return hashlib.sha256(json.dumps(recipe, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def get(self, digest: str) -> dict[str, Tensor] | None:
        """The tensors stored under a digest, on the CPU, or None."""
        path = self._files.path(digest)
        return safetensors.torch.load_file(path) if path.is_file() else None

    def put(self, digest: str, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors, all at once, unless they are there."""
        whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        self._files.write(digest, safetensors.torch.save(whole))
