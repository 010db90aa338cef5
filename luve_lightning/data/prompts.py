"""Prompts, given as words or in files: what to generate, and each line's options for its video."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from luve_lightning.data.video_files import check_name
from luve_lightning.files import text_digest

# What a line may hold besides its prompt, with types.
_KEYS: dict[str, type] = {
    "prompt": str,
    "negative_prompt": str,
    "name": str,
    "seed": int,
    "height": int,
    "width": int,
    "num_frames": int,
}
# UltraVideo's columns, for its CSV as a prompt file.
_ULTRAVIDEO = {"prompt": "Summarized Description", "name": "clip_id"}
# Unicode's categories of separators, control and format characters.
_INVISIBLE = ("Cc", "Cf", "Zl", "Zp", "Zs")
_LONGEST_FILE = 2**16  # bytes of a negative prompt's file; a text encoder reads 512 tokens
_LARGEST_SEED = 2**63 - 1  # the range of torch.Generator.manual_seed


@dataclass(frozen=True)
class PromptLine:
    """One line of a prompt file; None leaves the choice to the options.

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

        Only what the line itself says is hashed: compared methods, which have other options, give their videos the
        same names.
        """
        if self.name is not None:
            return self.name
        own = {key: value for key, value in asdict(self).items() if key != "where" and value is not None}
        digest = text_digest(json.dumps(own, sort_keys=True, ensure_ascii=False))
        return f"{slug(self.prompt)}-seed{seed}-{digest[:8]}"


def slug(text: str, length: int = 48) -> str:
    """The words of a text joined by hyphens, in lower case, cut between words; letters of any script stay."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())
    joined = "-".join(words)
    if len(joined) > length:
        cut = joined[: length + 1]
        joined = cut[: cut.rfind("-")] if "-" in cut else joined[:length]
    return joined or "video"


def given_prompts(prompt: str | None, prompts: Path | None, limit: int | None = None) -> list[PromptLine]:
    """One prompt, or those of a file.

    Args:
        prompt: what to show.
        prompts: the file; see `read_prompt_file`.
        limit: only the file's first prompts, this many.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither or both are given, or what is given is no prompt.
    """
    if (prompt is None) == (prompts is None):
        raise ValueError("expected a prompt, or --prompts FILE, and not both")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1 prompt, got {limit}")
    if prompts is not None:
        return read_prompt_file(prompts)[:limit]
    assert prompt is not None
    if not prompt.strip():
        raise ValueError("prompt: expected some words, got none")
    check_text(prompt, "prompt")
    check_visible(prompt, "prompt")
    return [PromptLine(prompt.strip())]


def read_prompt_file(path: Path) -> list[PromptLine]:
    """The prompts of a file; blank lines are skipped.

    Args:
        path: `.txt`, one prompt per line; `.jsonl`, one object per line with a prompt and any of negative_prompt,
            name, seed, height, width and num_frames; `.csv` with the same columns or UltraVideo's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a prompt file; the message names the line.
    """
    if not path.exists():
        raise FileNotFoundError(f"prompts: {path}: no such file")
    kinds = {".txt": _text_rows, ".jsonl": _json_rows, ".csv": _csv_rows}
    if path.suffix.lower() not in kinds or path.is_dir():
        raise ValueError(f"prompts: {path}: expected a .txt, .jsonl or .csv file")
    try:
        text = path.read_bytes().decode("utf-8-sig")  # keep line ends: a CSV's cell may hold some
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {path}: not UTF-8: {error.reason} at byte {error.start}") from None
    lines = [_line(row, f"{path}:{number}") for number, row in kinds[path.suffix.lower()](path, text)]
    if not lines:
        raise ValueError(f"prompts: {path}: no prompt in it")
    return lines


def given_negative_prompt(text: str | None, file: Path | None) -> str | None:
    """A negative prompt given as a text or by a file; None where neither is.

    Raises:
        FileNotFoundError: no such file.
        ValueError: both are given, or what is given is no text.
    """
    if text is not None and file is not None:
        raise ValueError(
            f"negative_prompt: given as a text and by the file {file}; expected one of them: "
            "--negative_prompt_file null drops the file"
        )
    if file is not None:
        return read_negative_prompt(file)
    check_text(text or "", "negative_prompt")
    return text


def read_negative_prompt(path: Path) -> str:
    """The text of a file that holds one negative prompt: all of it, but the spaces and line ends around it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a text, or nothing visible in it.
    """
    where = f"negative_prompt_file: {path}"
    if not path.exists():
        raise FileNotFoundError(f"{where}: no such file")
    if path.is_dir():
        raise ValueError(f"{where}: expected a text file, this is a folder")
    if path.stat().st_size > _LONGEST_FILE:
        raise ValueError(f"{where}: expected a short text, this file has {path.stat().st_size:,} bytes")
    try:
        text = path.read_bytes().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None
    check_text(text, where)
    check_visible(text, where)
    return text


def check_distinct(names: Iterable[tuple[str, str]]) -> None:
    """Refuse two lines with the same file; `names` are each one's file name and place.

    Raises:
        ValueError: names both places.
    """
    seen: dict[str, str] = {}
    for name, where in names:
        # Some file systems do not distinguish case, or ways of writing an accent.
        first = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), where)
        if first != where:
            raise ValueError(
                f"prompts: {where}: {name} is the video of {first} already; give one of them another seed or name"
            )


def text_lines(text: str) -> list[str]:
    """The lines of a text, ended by CR, LF or both.

    Unlike `splitlines`, which also splits at U+2028, U+0085 and others that may stand inside a prompt.
    """
    return re.split(r"\r\n|\r|\n", text)


def _text_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    del path
    for number, line in enumerate(text_lines(text), 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text_lines(text), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line, object_pairs_hook=_distinct)
        except (ValueError, RecursionError) as error:
            told = str(error)
            if isinstance(error, json.JSONDecodeError):
                told = f"{error.msg} at column {error.colno}"
            raise ValueError(f"prompts: {path}:{number}: not JSON: {told}") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys must differ: one of two values would be dropped."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)  # an open quote swallows rows
    try:
        columns = list(reader.fieldnames or ())
        sources = {key: key if key in columns else _ULTRAVIDEO.get(key, key) for key in _KEYS}
        if sources["prompt"] not in columns:
            raise ValueError(
                f"prompts: {path}:1: expected a column prompt or {_ULTRAVIDEO['prompt']}, got {sorted(columns)}"
            )
        if twice := [column for column in sources.values() if columns.count(column) > 1]:
            raise ValueError(f"prompts: {path}:1: the column {twice[0]} is there {columns.count(twice[0])} times")
        for column in columns if "prompt" in columns else ():  # UltraVideo's table has many of its own
            meant = re.sub(r"[\s-]+", "_", column.strip().lower())
            if meant in _KEYS and column not in sources.values():
                raise ValueError(f"prompts: {path}:1: unknown column {column!r}; did you mean {meant!r}?")
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row:
                raise ValueError(
                    f"prompts: {where}: {len(columns)} columns, but {len(columns) + len(row[None])} cells; "
                    "put a text with commas in double quotes"
                )
            cells = {key: row.get(column) for key, column in sources.items()}
            yield (
                reader.line_num,
                {key: _from_cell(key, cell, where) for key, cell in cells.items() if cell and cell.strip()},
            )
    except csv.Error as error:
        raise ValueError(f"prompts: {path}:{reader.line_num + 1}: not CSV: {error}") from None


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
        raise ValueError(f"prompts: {where}: expected a JSON object such as {{'prompt': 'a cat'}}, got {row!r}")
    for key, value in row.items():
        if key not in _KEYS:
            raise ValueError(f"prompts: {where}: unknown key {key!r}; known: {', '.join(_KEYS)}")
        # A bool is an int in Python, but no seed.
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            kind = "text" if _KEYS[key] is str else "a whole number"
            raise ValueError(f"prompts: {where}: {key}: expected {kind}, got {value!r}")
        if isinstance(value, str):
            check_text(value, f"prompts: {where}: {key}")
    line = PromptLine(**{"prompt": "", **row}, where=where)
    if not line.prompt.strip():
        raise ValueError(f"prompts: {where}: prompt: required, but not given")
    check_visible(line.prompt, f"prompts: {where}: prompt")
    if line.seed is not None:
        check_seed(line.seed, f"prompts: {where}: seed")
    if line.name is not None:
        check_name(line.name, f"prompts: {where}: name", signs=" _.+-()")
    return line


def check_text(text: str, what: str) -> None:
    """Refuse text that no file or command line can hold: NUL, and halves of characters, from broken UTF-8 or JSON.

    Raises:
        ValueError: names `what`.
    """
    if "\0" in text:
        raise ValueError(f"{what}: a NUL character after {text.partition(chr(0))[0][-20:]!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what}: no text: a broken character after {text[: error.start][-20:]!r}") from None


def check_visible(prompt: str, what: str) -> None:
    """Refuse a prompt with nothing visible: only spaces, zero-width and control characters.

    Raises:
        ValueError: names `what`.
    """
    if all(unicodedata.category(sign) in _INVISIBLE for sign in prompt):
        raise ValueError(f"{what}: expected some words, got invisible characters only: {prompt[:20]!a}")


def check_seed(seed: int, what: str) -> None:
    """Refuse a seed that no generator accepts.

    Raises:
        ValueError: names `what`.
    """
    if not 0 <= seed <= _LARGEST_SEED:
        raise ValueError(f"{what}: expected a whole number from 0 to 2**63 - 1, got {seed}")


def seed_of(name: str, seed: int) -> int:
    """A seed for one video, another for each name and each seed.

    Videos of one seed that begin with the same noise are not independent: what it does to one layout it does to all.
    """
    return int(text_digest(f"{seed} {name}")[:12], 16)
