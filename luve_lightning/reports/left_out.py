"""What a report was asked for and does not show, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from luve_lightning.datasets.clips import ClipError

Part = TypeVar("Part")


@dataclass(frozen=True)
class LeftOut:
    """One input that is not on the page, or not all of it.

    Attributes:
        key: of the configuration, such as `results.experts`.
        path: what it names.
        reason: `missing`, what cannot be read in it, or that it is too large.
    """

    key: str
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.path}: {self.reason}"


class Unreadable(ValueError):
    """An input that is there but holds something else than expected; the message does not name it."""


@dataclass
class Inputs:
    """Reads inputs by name and notes those that cannot be read.

    Attributes:
        left_out: in the order of reading.
    """

    left_out: list[LeftOut] = field(default_factory=list)

    def read(
        self, kind: str, paths: Mapping[str, Path | None], reader: Callable[[str, Path], Part]
    ) -> list[Part]:
        """What `reader(name, path)` makes of each input; null ones are passed over, bad ones noted."""
        found = []
        for name, path in paths.items():
            if path is None:
                continue
            part = self.attempt(f"{kind}.{name}", path, lambda name=name, path=path: reader(name, path))  # type: ignore[misc]
            if part is not None:
                found.append(part)
        return found

    def attempt(self, key: str, path: Path, read: Callable[[], Part]) -> Part | None:
        """What `read()` gives, or None after noting why it gives nothing."""
        try:
            return read()
        except FileNotFoundError as error:
            self.note(key, path, str(error) if "missing" in str(error) else "missing")
        except Unreadable as error:
            self.note(key, path, str(error))
        except ClipError as error:
            self.note(key, path, error.reason or str(error))
        except (OSError, UnicodeDecodeError) as error:
            self.note(key, path, f"cannot be read: {error}")
        return None

    def note(self, key: str, path: Path | str, reason: str) -> None:
        """Add a line."""
        self.left_out.append(LeftOut(key, str(path), " ".join(reason.split())))
