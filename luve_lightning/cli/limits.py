"""What jsonargparse lets through: null where it is no value, and sizes beyond what anyone means.

Both are refused before anything is loaded or started. Sizes are far above what anyone trains with; whether one fits
into the memory at hand is checked where it is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from luve_lightning.cli.errors import UsageError, components
from luve_lightning.cli.signatures import SPREAD
from luve_lightning.machine import check_workers

MOST = {
    **dict.fromkeys(("height", "width", "motion_height", "motion_width", "size", "tile", "max_side"), 65_536),
    **dict.fromkeys(("frames", "num_frames", "val_frames", "windows", "passes", "replicates"), 100_000),
    **dict.fromkeys(("frechet_replicates", "videos", "items"), 100_000),
    **dict.fromkeys(("batch_size", "crop", "length"), 65_536),
    **dict.fromkeys(
        ("steps", "skip_steps", "repeats", "raters", "num_nodes", "train", "val", "test"), 10_000
    ),
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
        if value != value:
            raise UsageError(f"{key}: expected a number, got nan")
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


def spread_options(function: Callable[..., Any]) -> type[Any] | None:
    """The dataclass whose fields are options of a verb themselves: the type of its parameter `options`, if any."""
    kind = get_type_hints(function).get(SPREAD)
    return kind if isinstance(kind, type) and is_dataclass(kind) else None


def check_groups(config: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Refuses a value in the place of a group of keys, such as `--guidance 5`, which jsonargparse takes or garbles.

    Args:
        config: As composed.
        function: Whose parameters the top level holds.

    Raises:
        UsageError: Names the key.
    """
    types = get_type_hints(function)
    if kind := spread_options(function):
        types |= get_type_hints(kind)
    for key, value in config.items():
        kind = types.get(key)
        if value is None or isinstance(value, Mapping) or not any(map(is_dataclass, (kind, *get_args(kind)))):
            continue
        if not (isinstance(value, str) and Path(value).is_file()):
            raise UsageError(
                f"{key}: expected keys inside, such as --{key}.KEY VALUE, or a file of them, got {value!r}"
            )


def check_nulls(config: Mapping[str, Any], import_class: Callable[[str], Any], function: Any = None) -> None:
    """Refuses null for an argument whose type does not include it.

    Args:
        config: Checked against the signatures.
        import_class: Gives the class of an import path.
        function: Whose parameters the top level holds, if it is a function's.

    Raises:
        UsageError: Names the key.
    """
    if function is not None:
        _refuse_nulls(config, function, "")
        if kind := spread_options(function):
            _refuse_nulls(config, kind, "")
    for class_path, key, arguments in components(config):
        if None in arguments.values():
            _refuse_nulls(arguments, import_class(class_path).__init__, f"{key}.init_args.")


def _refuse_nulls(arguments: Mapping[str, Any], function: Any, prefix: str) -> None:
    try:
        types, parameters = get_type_hints(function), inspect.signature(function).parameters
    except (NameError, TypeError, ValueError):  # annotations that cannot be resolved say nothing
        return
    for name, value in arguments.items():
        kind = types.get(name)
        if value is not None or kind is None or name not in parameters or parameters[name].default is None:
            continue
        if not _takes_null(kind):
            raise UsageError(f"{prefix}{name}: expected {getattr(kind, '__name__', kind)}, got null")


def _takes_null(kind: Any) -> bool:
    if get_origin(kind) in (Union, UnionType):
        return any(_takes_null(choice) for choice in get_args(kind))
    return kind in (Any, object, NoneType) or (get_origin(kind) is None and not isinstance(kind, type))
