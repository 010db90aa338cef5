"""Files that other processes may be using: writes that a kill cannot leave half done, and digests."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from luve_lightning.locks import runs

T = TypeVar("T")
R = TypeVar("R")

_UNFINISHED, _SUFFIX = ".unfinished-", ".tmp"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: for anything but a JSON object; one line that names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    return content


def find_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no readable one."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def text_digest(text: str) -> str:
    """sha256 of a text as UTF-8, 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits.

    Raises:
        OSError: when it cannot be read.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hub_digest(path: Path) -> str:
    """`file_digest`; the Hugging Face cache names a large file by it, which saves reading 17 GB."""
    content = path.resolve().name
    return content if re.fullmatch(r"[0-9a-f]{64}", content) else file_digest(path)


def listing_digest(files: Iterable[tuple[str, str]]) -> str:
    """sha256 of a folder's content, 64 hex digits, from the ordered (name, digest) of its files."""
    return text_digest("".join(f"{name}\0{digest}\n" for name, digest in files))


def new_file_mode() -> int:
    """Permissions of a new file under the process's umask, such as 0o644."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask


def follow_umask(path: Path) -> None:
    """Give a file, or every file below a folder, the permissions that the umask allows.

    For files of libraries that make them readable only by their owner: safetensors, tempfile.
    """
    mode = new_file_mode()
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block succeeds, and is removed otherwise.

    The content is flushed to disk before the rename: `path` is either the old file or the complete new one,
    whatever ends the process. Its permissions follow the umask. Leftovers of killed processes in the folder are
    removed first.

    Args:
        path: a file; its folder is created.

    Yields:
        The temporary path, an empty file of this process's own.

    Raises:
        OSError: for example on a full disk; `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path.parent)
    temporary = unfinished_path(path)
    with naming(path, temporary), _claimed(temporary, directory=False):
        yield temporary
        _sync(temporary)
        follow_umask(temporary)
        temporary.replace(path)
    _sync(path.parent)


def check_writable(path: Path) -> None:
    """Make a file beside `path` and remove it: what will be written there in the end should fail in the beginning.

    Args:
        path: a file, there or not; its folder is created.

    Raises:
        OSError: which names `path`.
    """
    temporary = unfinished_path(path)
    with naming(path, temporary):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # a file where a folder is wanted
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
        with _claimed(temporary, directory=False):
            pass


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically; creates its folder."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Make the block's OSErrors name their file: writing into an open file raises one that does not.

    Args:
        path: named by errors that name no file, or `temporary`.
        temporary: name under which `path` is made, unknown to the user.

    Raises:
        OSError: with its errno, such as ENOSPC for a full disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary), temporary):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def warn_kept_in_memory(folder: Path, error: OSError) -> None:
    """Say, once per folder and reason, that what a program caches there is not written down.

    Such folders are caches: one that is read-only, somebody else's or full must not end the run.
    """
    warnings.warn(
        f"{folder}: cannot be written ({error.strerror or error}): what would be remembered there is kept in memory, "
        "and found out again by the next run",
        stacklevel=1,  # the same line for all, so that Python's own filter shows equal texts once
    )


@contextmanager
def replacing_folder(path: Path, *, last: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder whose content replaces `path`'s when the block succeeds.

    Where `path` is missing or holds nothing that the new folder lacks, the two are swapped in one step. Otherwise,
    other content of `path` stays, and the new entries are moved into it one by one. Permissions follow the umask.

    Args:
        path: a folder.
        last: entries without which readers see nothing in the folder, such as "config.json"; where entries are
            moved one by one, these are removed first and come last, so that no reader sees old beside new.

    Yields:
        The temporary folder, empty.

    Raises:
        OSError: for example on a full disk; `path` is unchanged.
    """
    path = path.resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path.parent)
    remove_unfinished(path)
    beside = os.access(path.parent, os.W_OK) and not path.is_mount()
    temporary = unfinished_path(path if beside else path / path.name)
    with _claimed(temporary, directory=True):
        yield temporary
        follow_umask(temporary)
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        if not (beside and _swapped(temporary, path)):
            _move_entries(temporary, path, last)
    _sync(path.parent)


def unfinished_path(path: Path) -> Path:
    """The name under which this process makes `path`: beside it, hidden, unique to the process."""
    end = path.name.encode()[-120:].decode(errors="ignore")  # a file system's limit is 255 bytes
    return path.with_name(f"{_UNFINISHED}{_host()}.{os.getpid()}.{end}{_SUFFIX}")


def remove_unfinished(folder: Path) -> int:
    """Remove the unfinished files and folders of dead processes; a living one's stay.

    Returns:
        Number of files and folders removed.
    """
    leftovers = folder.glob(f"{_UNFINISHED}*{_SUFFIX}") if folder.is_dir() else ()
    abandoned = [leftover for leftover in leftovers if _is_abandoned(leftover)]
    for leftover in abandoned:
        _remove(leftover)
    return len(abandoned)


@contextmanager
def _claimed(temporary: Path, *, directory: bool) -> Iterator[None]:
    """Make a temporary file or folder, locked for as long as the block runs, and remove it when that fails."""
    _remove(temporary)  # from an earlier process with this one's id
    if directory:
        temporary.mkdir(parents=True)
    descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC | (0 if directory else os.O_CREAT), 0o666)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
        _remove(temporary)


def _is_abandoned(temporary: Path) -> bool:
    """Whether nobody is making it any more: its process is gone, or it is another machine's and not locked."""
    host, _, rest = temporary.name.removeprefix(_UNFINISHED).partition(".")
    pid = rest.partition(".")[0]
    if not pid.isdigit():
        return False  # not one of our names
    if host == _host():
        return not runs(int(pid))
    try:
        descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _host() -> str:
    """This machine's name without dots, which would end it in a file name."""
    return re.sub(r"[^A-Za-z0-9-]", "_", socket.gethostname())


def _swapped(new: Path, folder: Path) -> bool:
    """Replace `folder` by `new` in one step; False, with nothing changed, where that is impossible."""
    if not folder.exists():
        new.rename(folder)
        return True
    all_replaced = {entry.name for entry in folder.iterdir()} <= {entry.name for entry in new.iterdir()}
    return all_replaced and _exchange(new, folder)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step, where the system and the file system can."""
    rename: Callable[..., int] | None = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and not rename(here, os.fsencode(first), here, os.fsencode(second), exchange)


def _move_entries(new: Path, folder: Path, last: Sequence[str]) -> None:
    folder.mkdir(exist_ok=True)
    entries = sorted(new.iterdir(), key=lambda entry: entry.name in last)
    for entry in entries:
        if entry.name in last:
            _remove(folder / entry.name)
    for entry in entries:
        target = folder / entry.name
        if entry.is_dir() or target.is_dir():  # a rename replaces only files
            _remove(target)
        entry.replace(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Make a file's content, or a folder's names, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


Behind = Callable[[Callable[[], None]], None]


@contextmanager
def one_behind(waiting: int = 0) -> Iterator[Behind]:
    """Calls that run in a thread beside the caller, one at a time: the next one, and the end, wait for the last.

    So what two of them write is held at most. Raises what a call raised.

    Args:
        waiting: how many calls may wait for the one that runs before the caller does; what they write is held, too.
    """
    begun: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as thread:

        def behind(call: Callable[[], None]) -> None:
            while begun and (len(begun) > waiting or begun[0].done()):
                begun.popleft().result()
            begun.append(thread.submit(call))

        yield behind
        while begun:
            begun.popleft().result()


@contextmanager
def one_ahead(call: Callable[[T], R], items: Iterable[T]) -> Iterator[Iterator[Future[R]]]:
    """What a call gives for each item in turn; the next item's runs in a thread while the caller uses the last.

    So two results are held at most, if the caller drops the last before it asks for the next. An item whose call has
    not begun when the caller leaves is not begun any more.
    """
    thread = ThreadPoolExecutor(1)

    def results() -> Iterator[Future[R]]:
        begun: deque[Future[R]] = deque()
        for item in items:
            begun.append(thread.submit(call, item))
            if len(begun) > 1:
                yield begun.popleft()
        while begun:
            yield begun.popleft()

    try:
        yield results()
    finally:
        thread.shutdown(cancel_futures=True)
