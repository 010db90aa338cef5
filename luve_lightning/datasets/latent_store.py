"""Content-addressed latents on disk.

An entry is one safetensors file, `root/ab/abcdef....safetensors`, whose name is the digest of its `LatentKey`
and whose metadata holds the key itself. The key covers all that the latents depend on, so an entry never goes
stale: what no longer applies is not found.

While an entry is being made, its writer holds a lock on `root/ab/abcdef....tmp`. That one file is the claim
on the entry and the temporary file that becomes it: the writer fills it, syncs it and renames it. The
operating system drops the lock when the process dies, however it dies; what is left behind is an unlocked
file that the next writer takes over. Locks are `flock`, which Linux also honours on NFS.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from luve_lightning.datasets.latent_key import DTYPE_NAMES, ENCODER_VERSION, LatentKey
from luve_lightning.datasets.safetensors_window import Range, SafetensorsWindow

__all__ = ["ENCODER_VERSION", "LatentKey", "LatentStore", "StoreError", "StoreSize"]

_NAME = "latents"


class StoreError(ValueError):
    """Latents that cannot be stored, or an entry that cannot be trusted. The message is one line."""


@dataclass(frozen=True)
class StoreSize:
    """What a store holds: whole entries, their bytes, and files being written or left by a kill."""

    entries: int
    bytes: int
    unfinished: int


class LatentStore:
    """A folder of latents, safe to read and write from any number of processes.

    Args:
        root: the folder; made on the first write.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._claimed: dict[str, int] = {}  # digest -> descriptor of its locked temporary file

    def __getstate__(self) -> dict[str, Any]:
        # A claim belongs to the process that made it.
        return {"root": self.root, "_claimed": {}}

    def path(self, key: LatentKey) -> Path:
        """Where the entry of `key` is, or would be."""
        return self.root / key.digest[:2] / f"{key.digest}.safetensors"

    def has(self, key: LatentKey) -> bool:
        """Whether there is an entry for `key`."""
        return self.path(key).exists()

    @contextmanager
    def claim(self, key: LatentKey, *, wait: bool = False) -> Iterator[bool]:
        """Ask to be the one that makes an entry.

        Args:
            key: the entry.
            wait: wait for another claim on it to end instead of returning False.

        Yields:
            True when the entry is missing and this caller alone may `write` it until the block ends. False
            when it is there by now, or somebody else is making it.
        """
        temporary = self.path(key).with_suffix(".tmp")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(temporary, os.O_RDWR | os.O_CREAT, wait)
        if descriptor is None:
            yield False
            return
        try:
            if self.has(key):
                yield False
                return
            self._claimed[key.digest] = descriptor
            yield True
        finally:
            self._claimed.pop(key.digest, None)
            _unlink_locked(temporary, descriptor)
            os.close(descriptor)

    def write(self, key: LatentKey, latents: Tensor) -> int:
        """Store latents, all at once, unless the entry is there already.

        Outside a `claim` of this store it claims the entry itself, waiting for whoever is making it.

        Args:
            key: the entry.
            latents: C x t x h x w, any float dtype and device; stored as `key.dtype`.

        Returns:
            Bytes written, 0 when the entry was there.

        Raises:
            StoreError: for another rank, an empty axis, a value that is not finite or does not fit the dtype.
        """
        data = save({_NAME: _checked(key, latents)}, metadata={"key": key.json})
        if key.digest in self._claimed:
            return self._commit(key, data)
        with self.claim(key, wait=True) as mine:
            return self._commit(key, data) if mine else 0

    def _commit(self, key: LatentKey, data: bytes) -> int:
        # Popped first: from the rename on, the descriptor is the entry's, and a second write must not reach
        # it.
        descriptor = self._claimed.pop(key.digest)
        os.ftruncate(descriptor, 0)
        view = memoryview(data)
        done = 0
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], done)
        os.fsync(descriptor)
        path = self.path(key)
        # The folder is not synced: a power cut can take the new name back, never show half an entry under it.
        path.with_suffix(".tmp").replace(path)
        return len(data)

    def shape(self, key: LatentKey) -> tuple[int, int, int, int]:
        """Shape of an entry, (C, t, h, w), from its header.

        Raises:
            StoreError: as for `read`.
        """
        with self._open(key) as file:
            channels, frames, height, width = file.shape(_NAME)
        return channels, frames, height, width

    def read(self, key: LatentKey, t: Range = None, y: Range = None, x: Range = None) -> Tensor:
        """Read an entry, or a window of it, without reading the rest.

        Args:
            key: the entry.
            t: latent frames (start, stop); all when None.
            y: latent rows (start, stop); all when None.
            x: latent columns (start, stop); all when None.

        Returns:
            C x t x h x w in the stored dtype.

        Raises:
            StoreError: when there is no entry, it is damaged, or it was made for another key.
            ValueError: when the window is empty or outside the entry.
        """
        with self._open(key) as file:
            return file.read(_NAME, (None, t, y, x))

    def _open(self, key: LatentKey) -> SafetensorsWindow:
        path = self.path(key)
        try:
            file = SafetensorsWindow(path)
        except FileNotFoundError:
            raise StoreError(f"{self.root} has no latents for {key.json}") from None
        except ValueError as error:
            raise StoreError(f"damaged entry: {error}; delete it and run `luve precompute` again") from None
        if file.metadata.get("key") != key.json:
            file.close()
            raise StoreError(
                f"{path} was made for {file.metadata.get('key')}, expected {key.json}; delete it"
            )
        return file

    def clean(self) -> int:
        """Remove what killed writers left behind. Files that a living writer holds stay.

        Returns:
            How many files were removed.
        """
        removed = 0
        for temporary in self.root.glob("??/*.tmp"):
            with suppress(FileNotFoundError):
                descriptor = _lock(temporary, os.O_RDWR, wait=False)
                if descriptor is not None:
                    removed += _unlink_locked(temporary, descriptor)
                    os.close(descriptor)
        return removed

    def size(self) -> StoreSize:
        """Count entries, their bytes and unfinished files."""
        sizes = [path.stat().st_size for path in self.root.glob("??/*.safetensors")]
        return StoreSize(len(sizes), sum(sizes), sum(1 for _ in self.root.glob("??/*.tmp")))


def _checked(key: LatentKey, latents: Tensor) -> Tensor:
    """The tensor to store, or StoreError."""
    dtype = DTYPE_NAMES[key.dtype]
    if latents.ndim != 4 or latents.numel() == 0 or not latents.is_floating_point():
        raise StoreError(f"latents must be floats C x t x h x w, got {latents.dtype} {tuple(latents.shape)}")
    latents = latents.detach().to("cpu")
    stored = latents.to(dtype).contiguous()
    if not torch.isfinite(stored).all():
        if torch.isfinite(latents).all():
            limit, found = torch.finfo(dtype).max, latents.abs().max().item()
            raise StoreError(
                f"latents reach {found:.4g}, {key.dtype} holds up to {limit:.4g}: store them as float32"
            )
        raise StoreError(f"latents of clip {key.clip} have values that are not finite")
    return stored


def _lock(path: Path, flags: int, wait: bool) -> int | None:
    """Open and lock the file that is at `path` now; None when it is locked and `wait` is False."""
    while True:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)  # renamed or removed by whoever held it: look again


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _unlink_locked(path: Path, descriptor: int) -> bool:
    """Remove `path` if it is the locked file of `descriptor`, and not a later writer's."""
    if not _is_at(path, descriptor):
        return False
    path.unlink()
    return True
