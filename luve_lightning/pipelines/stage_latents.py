"""Latents of finished stages on disk."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from luve_lightning.datasets.claimed_files import ClaimedFiles
from luve_lightning.datasets.safetensors_window import DIGEST, tensor_digest
from luve_lightning.files import text_digest


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
        return text_digest(json.dumps(recipe, sort_keys=True, ensure_ascii=False))

    def get(self, digest: str) -> dict[str, Tensor] | None:
        """The tensors stored under a digest, on the CPU, or None; damaged ones are removed with a word."""
        path = self._files.path(digest)
        try:
            with safe_open(path, framework="pt") as file:
                known = (file.metadata() or {}).get(DIGEST)
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return None
        except SafetensorError as error:
            damage = str(error)
        else:
            if known is None or known == _digest(tensors):
                return tensors
            damage = "its values are not what was stored (sha256 differs)"
        warnings.warn(f"damaged latents of a stage are made again: {path}: {damage}", stacklevel=2)
        path.unlink(missing_ok=True)
        return None

    def put(self, digest: str, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors, all at once, unless they are there."""
        whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        self._files.write(digest, safetensors.torch.save(whole, {DIGEST: _digest(whole)}))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    named = "".join(f"{name} {tensor_digest(tensor)}\n" for name, tensor in sorted(tensors.items()))
    return text_digest(named)
