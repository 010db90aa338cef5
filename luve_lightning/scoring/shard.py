"""Which share of the clips a process scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """One of `count` processes that share the clips, `index` counted from 0."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard: expected i/n with 0 <= i < n, got {self}")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def file_name(self) -> str:
        """Of its part of the scores."""
        return f"part-{self.index:05d}-of-{self.count:05d}.parquet"


def parse_shard(text: str | None, environment: Mapping[str, str]) -> Shard:
    """The shard that an option or torchrun's environment names; the whole when neither does.

    Args:
        text: "i/n", or None.
        environment: may hold RANK and WORLD_SIZE.

    Raises:
        ValueError: no such share, or both name one.
    """
    processes = int(environment.get("WORLD_SIZE", "1"))
    if text is None:
        return Shard(int(environment.get("RANK", "0")), processes) if processes > 1 else Shard()
    if processes > 1:
        raise ValueError(
            f"shard: torchrun's {processes} processes share the clips by themselves; leave out {text!r}"
        )
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal()):
        raise ValueError(f"shard: expected i/n such as 0/4, got {text!r}")
    return Shard(int(first), int(second))
