"""What processes share: locks with an owner, JSON-lines files to append to, and work to divide."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)

# flock's errors where a file system lacks it (some network and FUSE mounts).
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EBADF)


@dataclass(frozen=True)
class Owner:
    """The holder of a lock.

    Attributes:
        pid: process id on its host; 0 when unknown.
        host: name of the machine.
        since: local time at which it took the lock, ISO 8601.
    """

    pid: int = 0
    host: str = ""
    since: str = ""

    @classmethod
    def me(cls) -> Owner:
        """This process, now."""
        return cls(os.getpid(), socket.gethostname(), datetime.now().astimezone().isoformat(timespec="seconds"))

    @classmethod
    def read(cls, path: Path) -> Owner:
        """The owner named in a lock file; an unknown one when it names none."""
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            return cls(int(facts["pid"]), str(facts["host"]), str(facts["since"]))
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return cls()

    def is_alive_here(self) -> bool:
        """Whether this is a process of this machine that still runs."""
        return self.host == socket.gethostname() and runs(self.pid)

    def __str__(self) -> str:
        if not self.pid:
            return "another process"
        return f"process {self.pid} on {self.host}, since {self.since}"


class Busy(RuntimeError):
    """Raised when another process holds a lock.

    Attributes:
        owner: who.
    """

    def __init__(self, what: str, owner: Owner) -> None:
        super().__init__(f"{what} is in use by {owner}")
        self.owner = owner


@contextmanager
def locked(path: Path, *, what: str) -> Iterator[None]:
    """Hold a lock file while the block runs; the kernel drops the lock when the process dies, however it dies.

    Processes that this one starts or forks do not hold it. Where the file system lacks `flock`, a warning says so
    and only a living owner on the same machine is recognised.

    Args:
        path: lock file, removed afterwards; its folder is created.
        what: name of what is locked, for the message.

    Raises:
        Busy: another process holds it; the text is `what` "is in use by process PID on HOST, since TIME".
        OSError: the lock file cannot be made.
    """
    descriptor = _open_locked(path, what)
    held = [descriptor]

    def let_go() -> None:
        while held:
            os.close(held.pop())

    # A forked child, such as a loader's worker, would keep the lock while it outlives this process.
    os.register_at_fork(after_in_child=let_go)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(Owner.me())).encode(), 0)
        yield
    finally:
        if held:  # not in a forked child that also leaves the block
            remove_locked(path, descriptor)
            let_go()


def try_lock(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int | None:
    """Lock a file for as long as this process, or one that inherits the descriptor, keeps it open.

    Returns:
        A descriptor of the file that is at `path` now; None when another process holds it.

    Raises:
        OSError: it cannot be opened, or its file system has no locks.
    """
    while True:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                return descriptor
        except BaseException as error:  # a signal's, too
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise
        os.close(descriptor)  # renamed or removed by its holder: look again


def remove_locked(path: Path, descriptor: int) -> bool:
    """Remove a file that `try_lock` locked, unless another has taken its name; returns whether it did."""
    at = _is_at(path, descriptor)
    if at:
        path.unlink(missing_ok=True)
    return at


class JsonLines:
    """A file of JSON objects, one per line, that any number of processes append to.

    A line is written in one go under a lock, so lines are complete. One that a kill cut off is left there and
    skipped.

    Args:
        path: the file; created, with its folders, by the first write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_to = 0

    def new(self, start_over: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
        """The objects appended since the last call, by anyone; none when there is no file.

        Args:
            start_over: called first when the file was emptied or replaced by a shorter one, which is then read
                whole.

        Raises:
            OSError: it cannot be read.
        """
        try:
            with self.path.open("rb") as stream:
                start = self._read_to  # once: other threads may be here, too
                if os.fstat(stream.fileno()).st_size < start:
                    start_over()
                    start = 0
                stream.seek(start)
                lines = stream.read()
        except (FileNotFoundError, NotADirectoryError):
            return []
        lines = lines[: lines.rfind(b"\n") + 1]
        self._read_to = start + len(lines)
        return [record for line in lines.split(b"\n") if (record := _parsed(line)) is not None]

    def append(self, record: Mapping[str, Any], unless: Callable[[], bool] = lambda: False) -> None:
        """Append an object.

        Args:
            record: JSON data.
            unless: called while no other process can append; True leaves the file unchanged.

        Raises:
            OSError: it cannot be written.
        """
        line = json.dumps(record, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        with os.fdopen(descriptor, "rb+", buffering=0) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # the kernel releases it even when the process is killed
            if unless():
                return
            end = stream.seek(0, os.SEEK_END)
            torn = end > 0 and os.pread(descriptor, 1, end - 1) != b"\n"
            stream.write(b"\n" * torn + line)


def _parsed(line: bytes) -> dict[str, Any] | None:
    with suppress(ValueError, RecursionError):
        if isinstance(record := json.loads(line), dict):
            return record
    return None


def _open_locked(path: Path, what: str) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = try_lock(path)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        owner = Owner.read(path)
        if owner.is_alive_here():
            raise Busy(what, owner) from None
        warnings.warn(
            f"{path.parent}: its file system has no locks; nothing keeps a second process out of {what}", stacklevel=4
        )
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    if descriptor is None:
        raise Busy(what, Owner.read(path))
    return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def runs(pid: int) -> bool:
    """Whether this machine has a process of that id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Claim(Protocol[T_contra]):
    """Claims an item, to be the only one that makes it; yields whether it may, for as long as the block runs."""

    def __call__(self, item: T_contra, /, *, wait: bool) -> AbstractContextManager[bool]:
        """With `wait`, wait for another claim to end instead of yielding False."""


def share_work(
    items: Iterable[T],
    done: Callable[[T], bool],
    claim: Claim[T],
    make: Callable[[list[T]], None],
    size: int = 1,
    found: Callable[[T], None] = lambda item: None,
) -> None:
    """Make every missing item; when it returns all exist, whoever made them.

    Processes that share the items share the work: each takes what no other is making, and at the end waits for
    what others have taken, to make it itself if they die. Waiting goes one at a time: a process that waits while
    it holds claims could wait for one that waits for it.

    Args:
        items: each once.
        done: whether an item exists.
        claim: see `Claim`.
        make: makes some items.
        size: number of items made at once.
        found: called for each item that exists already.
    """
    todo = list(items)
    for wait, most in ((False, size), (True, 1)):
        todo.reverse()
        taken: list[T] = []
        while todo:
            with ExitStack() as claims:
                batch: list[T] = []
                while todo and len(batch) < most:
                    item = todo.pop()
                    if done(item):  # a claim would make a file and remove it again
                        found(item)
                        continue
                    with ExitStack() as own:
                        mine = own.enter_context(claim(item, wait=wait))
                        if done(item):
                            found(item)
                        elif mine:
                            claims.enter_context(own.pop_all())
                            batch.append(item)
                        else:
                            taken.append(item)
                if batch:
                    make(batch)
        todo = taken
