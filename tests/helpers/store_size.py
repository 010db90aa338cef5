"""What a store's folder holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StoreSize:
    """Whole entries, their bytes, and files being written or left by a kill."""

    entries: int
    bytes: int
    unfinished: int


def store_size(root: Path) -> StoreSize:
    """Count entries, their bytes and unfinished files."""
    sizes = [path.stat().st_size for path in root.glob("??/*.safetensors")]
    return StoreSize(len(sizes), sum(sizes), sum(1 for _ in root.glob("??/*.tmp")))
