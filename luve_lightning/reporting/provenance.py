"""A report's missing inputs with reasons, and the provenance of those it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from luve_lightning.data.clip_container import ClipError
from luve_lightning.files import read_json

Part = TypeVar("Part")
Input = TypeVar("Input")


@dataclass(frozen=True)
class LeftOut:
    """One input that is not on the page, or not all of it.

    Attributes:
        key: key in the configuration, such as `results.experts`.
        path: path that it names.
        reason: `missing`, why it is unreadable, or that it is too large.
    """

    key: str
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.path}: {self.reason}"


class Unreadable(ValueError):
    """An existing input with unexpected content; the message does not name it."""


@dataclass
class Inputs:
    """Reads inputs by name and records those that cannot be read.

    Attributes:
        left_out: missing inputs, in the order of reading.
    """

    left_out: list[LeftOut] = field(default_factory=list)

    def read(
        self,
        kind: str,
        inputs: Mapping[str, Input | None],
        reader: Callable[[str, Input], Part],
        where: Callable[[Input], object] = str,
    ) -> list[Part]:
        """The result of `reader(name, input)` for each input; null ones are skipped, bad ones recorded.

        Args:
            kind: first part of their keys.
            inputs: by name.
            reader: reads one.
            where: returns what an input names.
        """
        given = [(name, value) for name, value in inputs.items() if value is not None]
        found = [self.attempt(f"{kind}.{n}", where(value), partial(reader, n, value)) for n, value in given]
        return [part for part in found if part is not None]

    def attempt(self, key: str, path: object, read: Callable[[], Part]) -> Part | None:
        """The result of `read()`, or None after recording why there is none."""
        try:
            return read()
        except FileNotFoundError as error:
            self.note(key, path, str(error) if "missing" in str(error) else "missing")
        except ClipError as error:
            self.note(key, path, error.reason or str(error))
        except (OSError, UnicodeDecodeError) as error:
            self.note(key, path, f"cannot be read: {error}")
        except ValueError as error:
            self.note(key, path, str(error))
        return None

    def note(self, key: str, path: object, reason: str) -> None:
        """Add a line."""
        self.left_out.append(LeftOut(key, str(path), " ".join(reason.split())))


_DIGITS = 12  # digits of a hash, as in its folder's name
_STAGE_COLUMNS = ("row", "seed", "name", "hash", "seconds")
# Other packages are in the JSON file itself; these affect the numbers.
_PACKAGES = ("torch", "lightning", "diffusers", "peft", "transformers", "torchmetrics", "numpy", "luve-lightning")


@dataclass(frozen=True)
class Origin:
    """What is known about one input.

    Attributes:
        key: key in the configuration.
        source: file that says so.
        facts: facts in words, by name.
        stages: stages of an ablation table, by _STAGE_COLUMNS.
    """

    key: str
    source: str
    facts: dict[str, str]
    stages: tuple[tuple[str, ...], ...] = ()

    @property
    def stage_columns(self) -> tuple[str, ...]:
        """Column headings of `stages`."""
        return _STAGE_COLUMNS


def of_results(key: str, path: Path, content: Mapping[str, Any]) -> Origin:
    """Provenance of an ablation table, from the JSON file beside it."""
    facts = {
        name: in_words(content[name])
        for name in ("world", "revision", "device", "date", "seeds", "settings", "command")
        if content.get(name) not in (None, "", [], {})
    }
    facts |= _packages(content.get("packages"))
    stages = content.get("stages")
    lines = [
        tuple(_cell(column, stage.get(column)) for column in _STAGE_COLUMNS)
        for stage in (stages if isinstance(stages, list) else [])
        if isinstance(stage, Mapping)
    ]
    return Origin(key, str(path), facts, tuple(lines))


def of_run(key: str, folder: Path) -> Origin | None:
    """Provenance of a training run, from the newest `provenance*.json` of its folder; None without one.

    Raises:
        ValueError: the file is not a JSON object.
    """
    files = sorted(folder.glob("provenance*.json"), key=lambda file: (len(file.name), file.name))
    if not files:
        return None
    content = read_json(files[-1])
    facts = {}
    if git := content.get("git"):
        facts["revision"] = in_words(git.get("revision", "")) + " with changes" * bool(git.get("dirty"))
    names = ("device", "started", "command")
    facts |= {name: in_words(content[name]) for name in names if content.get(name) is not None}
    return Origin(key, str(files[-1]), facts | _packages(content.get("packages")))


def in_words(value: Any) -> str:
    """A value of a JSON file in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {in_words(inside)}" for name, inside in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(in_words(inside) for inside in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _packages(packages: Any) -> dict[str, str]:
    if not isinstance(packages, Mapping):
        return {}
    chosen = {name: version for name, version in packages.items() if name.lower() in _PACKAGES}
    return {"packages": in_words(chosen or packages)}


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.1f}" if isinstance(value, float) else str(value)
    return text[:_DIGITS] if column == "hash" else text
