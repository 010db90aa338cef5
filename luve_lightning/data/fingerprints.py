"""sha256 of files, remembered so that a clip's bytes are read for it once."""

from __future__ import annotations

import errno
import os
import re
import time
from contextlib import suppress
from pathlib import Path

from luve_lightning.files import file_digest, text_digest, warn_kept_in_memory, write_text
from luve_lightning.locks import JsonLines
from luve_lightning.models.backbones import load_backbone

Stamp = tuple[int, int, int]

# A file changed twice within one tick of its file system's clock keeps its stamp (Git calls this "racily
# clean"). Ticks are up to 2 s (FAT); a hash of a file touched less than this ago is used, but not remembered.
_SETTLED_NS = 2_000_000_000
_SHA256 = re.compile(r"[0-9a-f]{64}")


def stamp(path: Path) -> Stamp:
    """Size in bytes, and the times in nanoseconds at which content and inode last changed.

    The inode time is there because tools such as rsync set the other one back.

    Raises:
        FileNotFoundError: when there is no file.
    """
    info = path.stat()
    return info.st_size, info.st_mtime_ns, info.st_ctime_ns


class FileHashes:
    """sha256 of files by path and stamp, in a file of JSON lines that any number of processes may append to.

    Where that file may not be written, or the disk is full, a hash is remembered by this object alone.

    Args:
        root: folder of the cache file, `file_hashes.jsonl`.
    """

    def __init__(self, root: str | Path) -> None:
        self._lines = JsonLines(Path(root) / "file_hashes.jsonl")
        self._known: dict[str, tuple[Stamp, str]] = {}
        self._writable = True

    def digest(self, path: str | Path) -> str:
        """sha256 of a file's bytes, 64 hex digits.

        Raises:
            FileNotFoundError: when there is no file.
            OSError: when it cannot be read, or changes while it is read.
        """
        file = _resolved(path)
        known = self.known(file)
        if known is not None:
            return known
        before = stamp(file)
        if not file.is_file():  # a named pipe would wait for ever
            raise OSError(errno.EINVAL, "not a file", str(file))
        digest = file_digest(file)
        if stamp(file) != before:
            raise OSError(f"{file} changed while it was read")
        if time.time_ns() - max(before[1:]) > _SETTLED_NS:
            self._remember(str(file), before, digest)
        return digest

    def known(self, path: str | Path) -> str | None:
        """The remembered sha256 of a file as it is now, or None. Reads none of its bytes.

        Raises:
            FileNotFoundError: when there is no file.
        """
        file = _resolved(path)
        now = stamp(file)
        for look in (lambda: None, self._refresh):
            look()
            found = self._known.get(str(file))
            if found is not None and found[0] == now:
                return found[1]
        return None

    def _remember(self, file: str, seen: Stamp, digest: str) -> None:
        self._known[file] = (seen, digest)
        if not self._writable:
            return
        try:
            self._lines.append({"path": file, "stamp": seen, "sha256": digest})
        except OSError as error:
            self._writable = False
            warn_kept_in_memory(self._lines.path.parent, error)

    def _refresh(self) -> None:
        """Take in what was appended since the last look, where the file may be read."""
        with suppress(OSError):
            for record in self._lines.new():
                with suppress(
                    ValueError, KeyError, TypeError
                ):  # of another kind: hashed again when it is needed
                    size, mtime, ctime = record["stamp"]
                    if _SHA256.fullmatch(record["sha256"]):
                        self._known[record["path"]] = ((size, mtime, ctime), record["sha256"])


def _resolved(path: str | Path) -> Path:
    """A path without links; OSError for links in a circle, which Python 3.11 and 3.12 call a RuntimeError."""
    try:
        return Path(path).resolve()
    except RuntimeError:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None


_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


def vae_fingerprint(backbone: str | Path, root: str | Path) -> str:
    """`LatentSpace.fingerprint()` of a backbone's VAE: from memory while the bytes of its files are the same.

    Args:
        backbone: a local pipeline folder or a hub id.
        root: folder of the latent store; remembers file hashes, and fingerprints under `vaes/`, where it may be
            written.

    Raises:
        FileNotFoundError: when the VAE cannot be had.
    """
    parts = load_backbone(backbone)
    folder = parts.vae_folder()
    if folder is None:
        return parts.latent_space().fingerprint()
    hashes = FileHashes(root)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
    contents = "".join(f"{path.name} {hashes.digest(path)}\n" for path in files)
    record = Path(root) / "vaes" / text_digest(contents)
    try:
        if _FINGERPRINT.fullmatch(known := record.read_text(encoding="ascii").strip()):
            return known
    except (OSError, ValueError):
        pass  # not there, or not ours to read
    fingerprint = parts.latent_space().fingerprint()
    try:
        write_text(record, f"{fingerprint}\n")
    except OSError as error:
        warn_kept_in_memory(Path(root), error)
    return fingerprint
