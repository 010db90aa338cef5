"""Sizes beyond which an option is a slip of the keyboard, refused before anything is loaded or started.

They are far above what anyone trains with; whether a size fits into the memory at hand is checked where it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from luve_lightning.commands.errors import UsageError
from luve_lightning.machine import check_workers

MOST = {
    **dict.fromkeys(("height", "width", "motion_height", "motion_width", "size", "tile", "max_side"), 65_536),
    **dict.fromkeys(("frames", "num_frames", "val_frames", "windows", "passes", "replicates"), 100_000),
    **dict.fromkeys(("frechet_replicates", "train", "val", "test", "videos", "items"), 100_000),
    **dict.fromkeys(("batch_size", "crop", "length"), 65_536),
    **dict.fromkeys(("steps", "skip_steps", "repeats", "raters", "num_nodes"), 10_000),
    "rank": 65_536,
    "fps": 1_000,
    "seed_everything": 2**32 - 1,
    "seed": 2**63 - 1,
}
_PROCESSES = ("num_workers", "processes", "slots")


def check_limits(config: Mapping[str, Any]) -> None:
    """Refuses a configuration with a size that no machine, or not this one, can serve.

    Args:
        config: Checked against the signatures, so that numbers are numbers.

    Raises:
        UsageError: Names the key, the most and what was given.
    """
    for key, value in _numbers(config):
        name = key.rpartition(".")[2]
        if name in _PROCESSES and value > 0:  # what is too few, its own verb says
            try:
                check_workers(key, int(value))
            except ValueError as error:
                raise UsageError(str(error)) from None
        elif name in MOST and value > MOST[name]:
            raise UsageError(f"{key}: expected at most {MOST[name]}, got {value}")


def _numbers(node: Any, path: str = "") -> Iterator[tuple[str, int | float]]:
    """Dotted key and value of every number, those in a list under the list's key."""
    if isinstance(node, int | float) and not isinstance(node, bool):
        yield path, node
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _numbers(value, path)
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _numbers(value, f"{path}.{key}" if path else str(key))
