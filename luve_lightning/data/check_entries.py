"""Reading the entries of a store to see whether they are what was stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

K = TypeVar("K")
_AHEAD = 64  # entries a thread


@dataclass
class EntryCheck:
    """What a check found.

    Attributes:
        sound: entries whose sha256 is that of what they hold.
        untold: entries that can be read, and hold no sha256 to compare with.
        missing: entries that are not there.
        damaged: what is wrong with each of the others, one line each.
        unreadable: why each of those could not be read that may be sound, one line each.
    """

    sound: int = 0
    untold: int = 0
    missing: int = 0
    damaged: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    @property
    def read(self) -> int:
        """Entries that are there."""
        return self.sound + self.untold + len(self.damaged) + len(self.unreadable)

    def lines(self, entries: str, verb: str) -> str:
        """The counts, and every damaged entry, as lines of text.

        Args:
            entries: what they are, such as "latents".
            verb: of the command line that makes them.
        """
        rows = [
            f"  sound          {self.sound} {entries}",
            f"  without sha256 {self.untold}" + (", stored before there was one" if self.untold else ""),
            f"  missing        {self.missing}" + (f", `luve {verb}` makes them" if self.missing else ""),
            f"  damaged        {len(self.damaged)}",
            *(f"    {line}" for line in self.damaged),
        ]
        if self.unreadable:
            rows += [f"  unreadable     {len(self.unreadable)}", *(f"    {line}" for line in self.unreadable)]
        return "\n".join(rows)

    def complaint(self, entries: str, verb: str) -> str:
        """The one line for entries that are damaged or cannot be read: how many, and the first; empty for none."""
        if not self.damaged:
            some = f"{len(self.unreadable)} of {self.read} {entries} cannot be read"
            return f"{some}, the first is {self.unreadable[0]}" if self.unreadable else ""
        first = self.damaged[0].partition("; delete it")[0]
        return (
            f"{len(self.damaged)} of {self.read} {entries} are damaged, the first is {first}; delete these "
            f"files and run `luve {verb}` again"
        )


def check_entries(
    keys: Iterable[K],
    has: Callable[[K], bool],
    check: Callable[[K], bool],
    threads: int,
    advance: Callable[[], None] = lambda: None,
) -> EntryCheck:
    """Read every entry that is there.

    Args:
        keys: of the entries.
        has: whether there is one.
        check: whether an entry has a sha256; raises ValueError when it is damaged, OSError when it cannot be read.
        threads: entries read at once.
        advance: told of every key that is done.
    """

    def look(key: K) -> bool | str | OSError | None:
        try:
            return check(key) if has(key) else None
        except OSError as error:  # of the disk, or of who may read: says nothing of the entry
            return error
        except ValueError as error:
            return " ".join(str(error).split())

    result, rest = EntryCheck(), iter(keys)
    with ThreadPoolExecutor(threads) as pool:
        while some := list(islice(rest, threads * _AHEAD)):  # an interrupt waits for these, not for all
            for found in pool.map(look, some):
                if found is None:
                    result.missing += 1
                elif isinstance(found, OSError):
                    result.unreadable.append(f"{found.filename}: {found.strerror}")
                elif isinstance(found, str):
                    result.damaged.append(found)
                elif found:
                    result.sound += 1
                else:
                    result.untold += 1
                advance()
    return result
