"""Weight files of networks that measure: where they are looked for, and one line when they are missing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from luve_lightning.files import file_digest
from luve_lightning.metrics.base import Unavailable

_CACHE = "~/.cache/luve-lightning"


def weights_folder() -> Path:
    """The folder for weights: $LUVE_WEIGHTS, or ~/.cache/luve-lightning."""
    return Path(os.environ.get("LUVE_WEIGHTS") or _CACHE).expanduser()


@dataclass(frozen=True)
class WeightFile:
    """A file that somebody else published. It is looked for, never downloaded.

    Attributes:
        name: the network, in words.
        file_name: name of the file wherever it is looked for.
        size_bytes: size, for people; checked only together with `sha256`.
        url: where to get it.
        purpose: what it is needed for.
        sha256: 64 hex digits, when the content must be exactly this.
        caches: folders where the library that usually loads it keeps it; `~` and environment variables are
            expanded.
    """

    name: str
    file_name: str
    size_bytes: int
    url: str
    purpose: str
    sha256: str | None = None
    caches: tuple[str, ...] = ()

    def find(self, given: str | Path | None = None) -> Path:
        """The file: a given path (the file or its folder), else in `weights_folder()`, else in `caches`.

        Raises:
            Unavailable: it is in none of them, or, with `sha256`, has another size; one line.
        """
        folders = [weights_folder(), *(Path(os.path.expandvars(cache)).expanduser() for cache in self.caches)]
        places = [folder / self.file_name for folder in folders]
        if given is not None:
            path = Path(given).expanduser()
            places = [path / self.file_name if path.is_dir() else path]
        for place in places:
            if place.is_file():
                self._check_size(place)
                return place
        missing = f"{places[0]} does not exist" if given is not None else f"{self.file_name} was not found"
        raise Unavailable(
            f"{self.purpose} needs {self.name}: {missing}; put {self.file_name} ({self.readable_size}, {self.url}) "
            f"into {weights_folder()} or give its path"
        )

    def find_exactly(self, given: str | Path | None = None) -> Path:
        """`find`, with the bytes compared to `sha256`: for files whose name readers trust.

        Raises:
            Unavailable: like `find`, or the content differs; one line.
        """
        path = self.find(given)
        if self.sha256 is not None and file_digest(path) != self.sha256:
            raise Unavailable(f"{path} is not {self.name}: its sha256 differs; get it from {self.url}")
        return path

    def _check_size(self, path: Path) -> None:
        size = path.stat().st_size
        if self.sha256 is not None and size != self.size_bytes:
            raise Unavailable(
                f"{path} has {size} bytes where {self.name} has {self.size_bytes}: cut short, or another file; "
                f"get it from {self.url}"
            )

    @property
    def readable_size(self) -> str:
        """The size in human-readable form: 8 kB, 96 MB, 1.7 GB."""
        if self.size_bytes >= 1e9:
            return f"{self.size_bytes / 1e9:.1f} GB"
        return (
            f"{self.size_bytes / 1e6:.0f} MB" if self.size_bytes >= 1e6 else f"{self.size_bytes / 1e3:.0f} kB"
        )
