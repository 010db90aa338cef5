"""Prompt files: what to generate, each line with what it says about its video."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# What a line may say besides its prompt, and the type of it.
_KEYS: dict[str, type] = {
    "prompt": str,
    "negative_prompt": str,
    "name": str,
    "seed": int,
    "height": int,
    "width": int,
    "num_frames": int,
}
# UltraVideo's columns, for its CSV as a file of prompts.
_ULTRAVIDEO = {"prompt": "Summarized Description", "name": "clip_id"}
_NAME = re.compile(r"[\w(][\w .+()-]{0,119}")
_SLUG_LENGTH = 48
_LARGEST_SEED = 2**63 - 1  # what torch.Generator.manual_seed takes


@dataclass(frozen=True)
class PromptLine:
    """One line of a prompt file; None where it leaves the choice to the options.

    Attributes:
        prompt: what to show.
        where: file and line, for messages.
    """

    prompt: str
    negative_prompt: str | None = None
    name: str | None = None
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    where: str = field(default="", compare=False)

    def video_name(self, seed: int) -> str:
        """The file name of the video, without suffix: the line's own, else its words, seed and a short hash.

        Only what the line itself says is hashed: methods that are compared, and so have other options, give their
        videos the same names.
        """
        if self.name is not None:
            return self.name
        own = {key: value for key, value in asdict(self).items() if key != "where" and value is not None}
        digest = hashlib.sha256(json.dumps(own, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
        return f"{slug(self.prompt)}-seed{seed}-{digest[:8]}"


def slug(text: str, length: int = _SLUG_LENGTH) -> str:
    """The words of a text joined by hyphens, in lower case, cut between words; letters of any script stay."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())
    joined = "-".join(words)
    if len(joined) > length:
        cut = joined[: length + 1]
        joined = cut[: cut.rfind("-")] if "-" in cut else joined[:length]
    return joined or "video"


def read_prompt_file(path: Path) -> list[PromptLine]:
    """The prompts of a file; blank lines are passed over.

    Args:
        path: `.txt`, one prompt a line; `.jsonl`, one object a line with a prompt and any of negative_prompt, name,
            seed, height, width and num_frames; `.csv` with the same columns or UltraVideo's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: something that is no prompt file; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"prompts: {path}: no such file")
    kinds = {".txt": _text_rows, ".jsonl": _json_rows, ".csv": _csv_rows}
    if path.suffix.lower() not in kinds:
        raise ValueError(f"prompts: {path}: expected a .txt, .jsonl or .csv file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {path}: not UTF-8: {error.reason} at byte {error.start}") from None
    lines = [_line(row, f"{path}:{number}") for number, row in kinds[path.suffix.lower()](path, text)]
    if not lines:
        raise ValueError(f"prompts: {path}: no prompt in it")
    return lines


def check_distinct(names: Iterable[tuple[str, str]]) -> None:
    """Refuse two lines that make one file.

    Args:
        names: file name and place of each.

    Raises:
        ValueError: with both places.
    """
    seen: dict[str, str] = {}
    for name, where in names:
        # Some file systems do not tell capitals from small letters.
        first = seen.setdefault(name.casefold(), where)
        if first != where:
            raise ValueError(
                f"prompts: {where}: {name} is the video of {first} already; give one of them another seed or name"
            )


def _text_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    del path
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    # Not splitlines: it also splits at U+2028, which JSON allows in a string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"prompts: {path}:{number}: not JSON: {error.msg} at column {error.colno}"
            ) from None


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(text.splitlines(keepends=True))
    columns = set(reader.fieldnames or ())
    sources = {key: key if key in columns else _ULTRAVIDEO.get(key, key) for key in _KEYS}
    if sources["prompt"] not in columns:
        raise ValueError(
            f"prompts: {path}:1: expected a column prompt or {_ULTRAVIDEO['prompt']}, got {sorted(columns)}"
        )
    for row in reader:
        cells = {key: row.get(column) for key, column in sources.items()}
        where = f"{path}:{reader.line_num}"
        yield (
            reader.line_num,
            {key: _from_cell(key, cell, where) for key, cell in cells.items() if cell and cell.strip()},
        )


def _from_cell(key: str, cell: str, where: str) -> Any:
    if _KEYS[key] is str:
        return cell.strip()
    try:
        return int(cell)
    except ValueError:
        raise ValueError(f"prompts: {where}: {key}: expected a whole number, got {cell!r}") from None


def _line(row: Any, where: str) -> PromptLine:
    """Check a row's keys, types and values."""
    if not isinstance(row, Mapping):
        raise ValueError(
            f"prompts: {where}: expected a JSON object such as {{'prompt': 'a cat'}}, got {row!r}"
        )
    for key, value in row.items():
        if key not in _KEYS:
            raise ValueError(f"prompts: {where}: unknown key {key!r}; known: {', '.join(_KEYS)}")
        # A bool is an int in Python, and no seed.
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            kind = "text" if _KEYS[key] is str else "a whole number"
            raise ValueError(f"prompts: {where}: {key}: expected {kind}, got {value!r}")
    line = PromptLine(**{"prompt": "", **row}, where=where)
    if not line.prompt.strip():
        raise ValueError(f"prompts: {where}: prompt: required, but not given")
    if line.seed is not None:
        check_seed(line.seed, f"prompts: {where}: seed")
    if line.name is not None and not _NAME.fullmatch(line.name):
        raise ValueError(
            f"prompts: {where}: name {line.name!r}: expected a file name without suffix: "
            "letters, digits, spaces and _ . + - ( )"
        )
    return line


def check_seed(seed: int, what: str) -> None:
    """Refuse a seed that no generator takes.

    Raises:
        ValueError: with `what`.
    """
    if not 0 <= seed <= _LARGEST_SEED:
        raise ValueError(f"{what}: expected a whole number from 0 to 2**63 - 1, got {seed}")
