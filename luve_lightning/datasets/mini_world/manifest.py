"""Whose folder it is, and what is in it: the mini world's manifest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luve_lightning.files import file_digest, write_text

MANIFEST = "MANIFEST.json"
# Holds the arguments until the manifest does; a folder with it alone was interrupted and can be resumed.
UNFINISHED = "UNFINISHED.json"


class OtherWorldError(ValueError):
    """The folder holds something else than the world asked for."""


def claim(output: Path, arguments: dict[str, int]) -> dict[str, str]:
    """Takes a folder for a world, or recognises the world in it.

    Args:
        output: The folder; made when missing.
        arguments: What decides every byte of the world.

    Returns:
        SHA-256 by file name from the manifest; empty when the world is not complete yet.

    Raises:
        OtherWorldError: The folder holds a world of other arguments, or something else.
    """
    if output.exists() and not output.is_dir():
        raise OtherWorldError(f"{output}: expected a folder, found a file")
    for name in (MANIFEST, UNFINISHED):
        record = _read_record(output / name)
        if record is not None:
            _check_same(output, record["arguments"], arguments)
            return dict(record.get("sha256", {}))
    if output.is_dir() and any(not path.name.startswith(".") for path in output.iterdir()):
        raise OtherWorldError(f"{output}: is not empty and holds no mini world; choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / UNFINISHED, json.dumps({"arguments": arguments}, indent=2) + "\n")
    return {}


def write_manifest(output: Path, arguments: dict[str, int], names: Sequence[str]) -> None:
    """Declares a world complete: writes its arguments and the SHA-256 of each named file."""
    hashes = {name: file_digest(output / name) for name in names}
    write_text(output / MANIFEST, json.dumps({"arguments": arguments, "sha256": hashes}, indent=2) + "\n")
    (output / UNFINISHED).unlink(missing_ok=True)


def matches(path: Path, expected: str | None) -> bool:
    """Returns whether a file is there and has this SHA-256."""
    return path.is_file() and file_digest(path) == expected


def _check_same(output: Path, held: dict[str, int], asked: dict[str, int]) -> None:
    other = [
        f"{key}={held.get(key)} (asked {value})" for key, value in asked.items() if held.get(key) != value
    ]
    if other:
        raise OtherWorldError(
            f"{output}: holds a mini world with {', '.join(other)}; choose another folder or remove this one"
        )


def _read_record(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise OtherWorldError(f"{path}: is not JSON ({error}); remove the folder, render again") from error
    facts = record if isinstance(record, dict) else {}
    if not (isinstance(facts.get("arguments"), dict) and isinstance(facts.get("sha256", {}), dict)):
        raise OtherWorldError(f"{path}: is not a mini world's manifest; choose another folder")
    return facts
