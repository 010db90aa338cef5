"""Tensors on disk under the digest of everything they depend on: written once, atomically, by any number of processes.

An entry is one file, `root/ab/abcdef....safetensors`, named by the digest of its key, with the key in its
metadata. The key covers everything the tensor depends on, so an entry never goes stale: what no longer applies is
not found. A sha256 in the metadata reveals flipped bits whenever an entry is read whole; entries written before
there was one stay valid.

While a file is being made, its writer holds a lock on `root/ab/abcdef....tmp`. That one file is both the claim and
the temporary file that becomes the entry: the writer fills it, syncs it and renames it. The operating system drops
the lock when the process dies, however it dies; an unlocked file remains, which the next writer takes over. Locks
are `flock`, which Linux also honours on NFS.
"""

from __future__ import annotations

import errno
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor

from luve_lightning.files import naming
from luve_lightning.locks import remove_locked, try_lock
from luve_lightning.safetensors_window import DIGEST, SafetensorsWindow, packed, tensor_digest

_AHEAD = 64  # entries that a thread reads before it notices an interrupt
_SHOWN = 600  # characters of a strange key in a message
# Seconds. Waiting inside `flock` would not do: a signal just before that call, or to another thread, does not end
# it, and Python could not handle it.
_ASK_AGAIN = 0.02


def _remove_abandoned(temporary: Path) -> bool:
    """Remove an unfinished file unless a living writer holds it; returns whether it did."""
    try:
        descriptor = try_lock(temporary, os.O_RDWR)
    except OSError as error:
        # Another process removes it, or the store may not be written, and then nothing needs room in it.
        if error.errno not in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return False
    if descriptor is None:
        return False
    removed = remove_locked(temporary, descriptor)
    os.close(descriptor)
    return removed


class ClaimedFiles:
    """A folder of files named by digests.

    Args:
        root: the folder; created by the first write.
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
        """Claim a file, to be the only one that makes it.

        Args:
            digest: its name.
            wait: wait for another claim on it to end instead of returning False.

        Yields:
            True when the file is missing and only this caller may `write` it until the block ends. False when it
            exists by now, or another process is making it.
        """
        temporary = self.path(digest).with_suffix(".tmp")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            while (descriptor := try_lock(temporary)) is None and wait:
                time.sleep(_ASK_AGAIN)
        except BaseException:  # a signal's, perhaps just after the file was made
            _remove_abandoned(temporary)
            raise
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
        """Write a file atomically, unless it exists.

        Outside a `claim` by this object it claims the file itself, waiting for another process that is making it.

        Returns:
            Number of bytes written, 0 when the file existed.
        """
        if digest in self._claimed:
            return self._commit(digest, data)
        with self.claim(digest, wait=True) as mine:
            return self._commit(digest, data) if mine else 0

    def _commit(self, digest: str, data: bytes) -> int:
        # Popped first: after the rename, the descriptor is the entry's, and a second write must not reach it.
        descriptor = self._claimed.pop(digest)
        path = self.path(digest)
        with naming(path):  # a full disk's error names no file
            os.ftruncate(descriptor, 0)
            view = memoryview(data)
            done = 0
            while done < len(view):
                done += os.pwrite(descriptor, view[done:], done)
            os.fsync(descriptor)
        # The folder is not synced: a power cut can remove the new name, but never leaves half an entry under it.
        path.with_suffix(".tmp").replace(path)
        return len(data)

    def clean(self) -> int:
        """Remove what killed writers left behind. Files that a living writer holds stay.

        Returns:
            Number of files removed.
        """
        return sum(_remove_abandoned(temporary) for temporary in self.root.glob("??/*.tmp"))


class StoreError(ValueError):
    """A tensor that cannot be stored, or an entry that cannot be trusted. The message is one line."""


class EntryKey(Protocol):
    """What determines the address of an entry."""

    @property
    def json(self) -> str:
        """Everything the tensor depends on, as canonical JSON."""

    @property
    def digest(self) -> str:
        """sha256 of `json`."""


K = TypeVar("K", bound=EntryKey)


class TensorStore(ABC, Generic[K]):
    """A folder of tensors, safe to read and write from any number of processes.

    Args:
        root: the folder; created by the first write.
    """

    entries: ClassVar[str]
    """Its content, such as "latents"."""
    verb: ClassVar[str]
    """The verb that fills it."""
    damage: ClassVar[str]
    """Content of an entry with a wrong sha256, in words."""
    tensor: ClassVar[str]
    """Name of the tensor in the file."""
    rank: ClassVar[int]
    """Axes of the tensor."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._files = ClaimedFiles(root)

    @abstractmethod
    def checked(self, key: K, tensor: Tensor) -> Tensor:
        """The tensor to store, on the CPU in the dtype on disk; StoreError when it cannot belong to `key`."""

    @abstractmethod
    def missing(self, key: K) -> str:
        """The message for a missing entry."""

    def fits(self, key: K, tensor: Tensor) -> bool:
        """Whether a stored tensor can belong to `key`."""
        return tensor.numel() > 0

    def path(self, key: K) -> Path:
        """Where the entry of `key` is, or would be."""
        return self._files.path(key.digest)

    def has(self, key: K) -> bool:
        """Whether there is an entry for `key`."""
        return self.path(key).exists()

    @contextmanager
    def claim(self, key: K, *, wait: bool = False) -> Iterator[bool]:
        """Claim an entry, to be the only one that makes it; see `ClaimedFiles.claim`."""
        with self._files.claim(key.digest, wait=wait) as mine:
            yield mine

    def write(self, key: K, tensor: Tensor) -> int:
        """Store a tensor atomically, unless the entry exists.

        Outside a `claim` by this store it claims the entry itself, waiting for another process that is making it.

        Args:
            key: the entry.
            tensor: see `checked`; any float dtype and device.

        Returns:
            Number of bytes written, 0 when the entry existed.

        Raises:
            StoreError: from `checked`.
        """
        data = packed(self.tensor, self.checked(key, tensor), {"key": key.json})
        return self._files.write(key.digest, data)

    def shape(self, key: K) -> tuple[int, ...]:
        """Shape of an entry, from its header.

        Raises:
            StoreError: when there is no entry, it is damaged, or it was made for another key.
        """
        with self._open(key) as file:
            return file.shape(self.tensor)

    def check(self, key: K) -> bool:
        """Read an entry to see whether it is undamaged.

        Returns:
            True when it is; False when nothing tells, because the entry was written before there was a sha256.

        Raises:
            StoreError: as for `shape`.
        """
        return self._whole(key)[1]

    def check_all(self, keys: Iterable[K], threads: int, advance: Callable[[], None] = lambda: None) -> EntryCheck:
        """Read every existing entry.

        Args:
            keys: keys of the entries.
            threads: entries read at once.
            advance: called for every finished key.
        """

        def look(key: K) -> bool | str | OSError | None:
            try:
                return self.check(key) if self.has(key) else None
            except OSError as error:  # the disk's or permissions' fault: says nothing about the entry
                return error
            except ValueError as error:
                return " ".join(str(error).split())

        result, rest = EntryCheck(self.entries, self.verb), iter(keys)
        with ThreadPoolExecutor(threads) as pool:
            while some := list(islice(rest, threads * _AHEAD)):
                for found in pool.map(look, some):
                    result.count(found)
                    advance()
        return result

    def clean(self) -> int:
        """Remove what killed writers left behind; returns the number of files."""
        return self._files.clean()

    def _whole(self, key: K) -> tuple[Tensor, bool]:
        """An entry, and whether its sha256 was compared."""
        with self._open(key) as file:
            try:
                tensor = file.whole(self.tensor)
            except ValueError as error:
                raise self._damaged(str(error)) from None
            known = file.metadata.get(DIGEST)
        if not self.fits(key, tensor) or known not in (None, tensor_digest(tensor)):
            raise self._damaged(f"{self.path(key)} holds {self.damage} (sha256 differs)")
        return tensor, known is not None

    def _open(self, key: K) -> SafetensorsWindow:
        path = self.path(key)
        try:
            file = SafetensorsWindow(path)
        except FileNotFoundError:
            raise StoreError(self.missing(key)) from None
        except ValueError as error:
            raise self._damaged(str(error)) from None
        try:
            if file.metadata.get("key") != key.json:
                made_for = str(file.metadata.get("key"))[:_SHOWN]
                raise StoreError(f"{path} was made for {made_for}, expected {key.json}; delete it")
            if len(shape := file.shape(self.tensor)) != self.rank:
                raise ValueError(f"{path} holds {self.tensor} of shape {shape}, expected {self.rank} axes")
        except ValueError as error:
            file.close()
            raise error if isinstance(error, StoreError) else self._damaged(str(error)) from None
        return file

    def _damaged(self, what: str) -> StoreError:
        return StoreError(f"damaged entry: {what}; delete it and run `luve {self.verb}` again")


@dataclass
class EntryCheck:
    """The result of a check.

    Attributes:
        entries: what was checked, such as "latents".
        verb: verb that makes them.
        sound: number of entries whose sha256 matches their content.
        untold: number of readable entries without a sha256 to compare with.
        missing: number of missing entries.
        damaged: what is wrong with each damaged entry, one line each.
        unreadable: why each unreadable entry, which may be sound, could not be read, one line each.
    """

    entries: str
    verb: str
    sound: int = 0
    untold: int = 0
    missing: int = 0
    damaged: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    @property
    def read(self) -> int:
        """Number of existing entries."""
        return self.sound + self.untold + len(self.damaged) + len(self.unreadable)

    def count(self, found: bool | str | OSError | None) -> None:
        """Add an entry: whether it has a sha256, what is wrong with it, why it cannot be read; None if missing."""
        if found is None:
            self.missing += 1
        elif isinstance(found, OSError):
            self.unreadable.append(f"{found.filename}: {found.strerror}")
        elif isinstance(found, str):
            self.damaged.append(found)
        elif found:
            self.sound += 1
        else:
            self.untold += 1

    def __str__(self) -> str:
        """The counts, and every damaged entry, as lines of text."""
        rows = [
            f"  sound          {self.sound} {self.entries}",
            f"  without sha256 {self.untold}" + (", stored before there was one" if self.untold else ""),
            f"  missing        {self.missing}" + (f", `luve {self.verb}` makes them" if self.missing else ""),
            f"  damaged        {len(self.damaged)}",
            *(f"    {line}" for line in self.damaged),
        ]
        if self.unreadable:
            rows += [f"  unreadable     {len(self.unreadable)}", *(f"    {line}" for line in self.unreadable)]
        return "\n".join(rows)

    def complain(self) -> None:
        """Raise when entries are damaged or unreadable.

        Raises:
            StoreError: how many, and the first.
        """
        if self.damaged:
            first = self.damaged[0].partition("; delete it")[0]
            raise StoreError(
                f"{len(self.damaged)} of {self.read} {self.entries} are damaged, the first is {first}; delete these "
                f"files and run `luve {self.verb}` again"
            )
        if self.unreadable:
            some = f"{len(self.unreadable)} of {self.read} {self.entries} cannot be read"
            raise StoreError(f"{some}, the first is {self.unreadable[0]}")
