"""The videos of several methods and their originals, matched by file name, and their prompts."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luve_lightning.data.video_files import PICTURE_SUFFIXES, VIDEO_SUFFIXES, check_name, find_videos, video_name

_NAMES = ("name", "video", "clip_id")


@dataclass(frozen=True)
class VideoSets:
    """Videos to evaluate.

    Attributes:
        methods: each method's files by `video_name`, methods in the table's order.
        originals: files by name that methods are compared with; empty when there are none.
        prompts: prompts by name, where known.
    """

    methods: dict[str, dict[str, Path]]
    originals: dict[str, Path]
    prompts: dict[str, str]

    @property
    def names(self) -> list[str]:
        """Every name that a method or the originals have, sorted."""
        return sorted({name for files in self.methods.values() for name in files} | self.originals.keys())

    def missing(self) -> dict[str, list[str]]:
        """For each method, the names that others have and it lacks; complete methods are left out."""
        every = {name for files in self.methods.values() for name in files}
        lacking = {method: sorted(every - files.keys()) for method, files in self.methods.items()}
        return {method: names for method, names in lacking.items() if names}

    def without_original(self) -> list[str]:
        """Names that some method has and the originals lack; none when there are no originals at all."""
        every = {name for files in self.methods.values() for name in files}
        return sorted(every - self.originals.keys()) if self.originals else []


def find_video_sets(
    methods: Mapping[str, Path], originals: Path | None = None, prompts: Path | None = None
) -> VideoSets:
    """Find the files.

    Args:
        methods: folder of each method.
        originals: folder of what the methods should have made.
        prompts: CSV or JSONL with the columns `name` (or `video`, `clip_id`) and `prompt`; without it, the
            `prompt` in a JSON file of the same name beside each video. A video without one is no error.

    Raises:
        FileNotFoundError: a folder or file is missing, or a folder has no video.
        ValueError: no methods, a bad name of one, unreadable prompts, or no name in common with the originals.
    """
    if not methods:
        raise ValueError("videos: expected at least one method, as --videos NAME=DIR")
    for method in methods:
        check_name(method, "videos:")
    files = {method: _by_name(f"videos.{method}", folder) for method, folder in methods.items()}
    references = {} if originals is None else _by_name("reference", originals)
    if references and not any(references.keys() & found.keys() for found in files.values()):
        raise ValueError(f"reference: no video in {originals} has the name of a video of {', '.join(methods)}")
    everything = [path for found in [references, *files.values()] for path in found.values()]
    if prompts is None:
        return VideoSets(files, references, _prompts_beside(everything))
    texts = read_prompts(prompts)
    if not texts.keys() & {video_name(path) for path in everything}:
        raise ValueError(f"prompts: none of the {len(texts)} names in {prompts} is that of a video")
    return VideoSets(files, references, texts)


def read_prompts(path: Path) -> dict[str, str]:
    """Prompts by video name from a CSV or JSONL file; a suffix of the name is dropped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, or columns missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"prompts: {path}: no such file")
    readers = {".csv": _csv_rows, ".jsonl": _json_rows}
    if path.suffix.lower() not in readers:
        raise ValueError(f"prompts: {path}: expected a .csv or a .jsonl file")
    try:
        rows = list(readers[path.suffix.lower()](path.read_bytes().decode("utf-8-sig")))
    except (UnicodeDecodeError, csv.Error, ValueError, RecursionError) as error:
        raise ValueError(f"prompts: {path}: cannot be read: {error}") from None
    prompts: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        key = next((key for key in _NAMES if isinstance(row, dict) and row.get(key)), None)
        if key is None or not isinstance(row.get("prompt"), str):
            raise ValueError(f"prompts: {path}: row {number}: expected the keys name and prompt, got {row}")
        if None in row:  # fields of a CSV beyond its columns
            raise ValueError(
                f"prompts: {path}: row {number}: more cells than columns; put a text with commas in double quotes"
            )
        name = unicodedata.normalize("NFC", str(row[key]))
        name = video_name(name) if Path(name).suffix.lower() in (*VIDEO_SUFFIXES, *PICTURE_SUFFIXES) else name
        if prompts.setdefault(name, row["prompt"]) != row["prompt"]:
            raise ValueError(f"prompts: {path}: row {number}: {name} has another prompt in an earlier row")
    return prompts


def _csv_rows(text: str) -> Iterable[Any]:
    return csv.DictReader(io.StringIO(text, newline=""), strict=True)  # an open quote swallows rows


def _json_rows(text: str) -> Iterable[Any]:
    # Lines end at CR and LF only: U+2028 and the like may stand inside a prompt.
    return (json.loads(line) for line in re.split(r"\r\n|\r|\n", text) if line.strip())


def _by_name(key: str, folder: Path) -> dict[str, Path]:
    try:
        return {video_name(path): path for path in find_videos(folder, pictures=True)}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _prompts_beside(paths: Iterable[Path]) -> dict[str, str]:
    found: dict[str, tuple[str, Path]] = {}
    for path in paths:
        beside, name = path.with_suffix(".json"), video_name(path)
        if not beside.is_file():
            continue
        try:
            content = json.loads(beside.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{beside}: not JSON ({error})") from None
        if isinstance(content, dict) and isinstance(content.get("prompt"), str):
            prompt, first = found.setdefault(name, (content["prompt"], beside))
            if prompt != content["prompt"]:
                raise ValueError(
                    f"prompts: {first} and {beside} have different prompts for {name}; say which with --prompts FILE"
                )
    return {name: prompt for name, (prompt, _) in found.items()}
