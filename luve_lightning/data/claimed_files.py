"""Files that any number of processes write, each file once, and never half.

A file is `root/ab/abcdef....safetensors`, named by a digest of all that its content depends on.

While a file is being made, its writer holds a lock on `root/ab/abcdef....tmp`. That one file is the claim and the
temporary file that becomes the entry: the writer fills it, syncs it and renames it. The operating system drops
the lock when the process dies, however it dies; what is left behind is an unlocked file that the next writer
takes over. Locks are `flock`, which Linux also honours on NFS.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luve_lightning.files import naming
from luve_lightning.locks import remove_locked, try_lock

# Seconds. Waiting inside `flock` would not do: a signal that comes just before that call, or to another thread, does
# not end it, and Python would not get to handle it.
_ASK_AGAIN = 0.02


@dataclass(frozen=True)
class StoreSize:
    """What a store holds: whole entries, their bytes, and files being written or left by a kill."""

    entries: int
    bytes: int
    unfinished: int


class ClaimedFiles:
    """A folder of files named by digests.

    Args:
        root: the folder; made on the first write.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._claimed: dict[str, int] = {}  # digest -> descriptor of its locked temporary file

    def __getstate__(self) -> dict[str, Any]:
        # A claim belongs to the process that made it.
        return {"root": self.root, "_claimed": {}}

    def path(self, digest: str) -> Path:
        """Where the file is, or would be. 256 folders keep each of them short."""
        return self.root / digest[:2] / f"{digest}.safetensors"

    @contextmanager
    def claim(self, digest: str, *, wait: bool = False) -> Iterator[bool]:
        """Ask to be the one that makes a file.

        Args:
            digest: its name.
            wait: wait for another claim on it to end instead of returning False.

        Yields:
            True when the file is missing and this caller alone may `write` it until the block ends. False when it
            is there by now, or somebody else is making it.
        """
        temporary = self.path(digest).with_suffix(".tmp")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        while (descriptor := try_lock(temporary)) is None and wait:
            time.sleep(_ASK_AGAIN)
        if descriptor is None:
            yield False
            return
        try:
            if self.path(digest).exists():
                yield False
                return
            self._claimed[digest] = descriptor
            yield True
        finally:
            self._claimed.pop(digest, None)
            remove_locked(temporary, descriptor)
            os.close(descriptor)

    def write(self, digest: str, data: bytes) -> int:
        """Write a file, all at once, unless it is there already.

        Outside a `claim` of this object it claims the file itself, waiting for whoever is making it.

        Returns:
            Bytes written, 0 when the file was there.
        """
        if digest in self._claimed:
            return self._commit(digest, data)
        with self.claim(digest, wait=True) as mine:
            return self._commit(digest, data) if mine else 0

    def _commit(self, digest: str, data: bytes) -> int:
        # Popped first: from the rename on, the descriptor is the entry's, and a second write must not reach it.
        descriptor = self._claimed.pop(digest)
        path = self.path(digest)
        with naming(path):  # a full disk's error names no file
            os.ftruncate(descriptor, 0)
            view = memoryview(data)
            done = 0
            while done < len(view):
                done += os.pwrite(descriptor, view[done:], done)
            os.fsync(descriptor)
        # The folder is not synced: a power cut can take the new name back, never show half an entry under it.
        path.with_suffix(".tmp").replace(path)
        return len(data)

    def clean(self) -> int:
        """Remove what killed writers left behind. Files that a living writer holds stay.

        Returns:
            How many files were removed.
        """
        removed = 0
        for temporary in self.root.glob("??/*.tmp"):
            # Somebody else removes it, or the store may not be written, and then nothing needs room in it.
            with suppress(FileNotFoundError, PermissionError), _unless_read_only():
                descriptor = try_lock(temporary, os.O_RDWR)
                if descriptor is not None:
                    removed += remove_locked(temporary, descriptor)
                    os.close(descriptor)
        return removed

    def size(self) -> StoreSize:
        """Count entries, their bytes and unfinished files."""
        sizes = [path.stat().st_size for path in self.root.glob("??/*.safetensors")]
        return StoreSize(len(sizes), sum(sizes), sum(1 for _ in self.root.glob("??/*.tmp")))


@contextmanager
def _unless_read_only() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
