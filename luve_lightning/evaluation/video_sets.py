"""The videos of several methods and their originals, matched by file name, and their prompts."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luve_lightning.datasets.video_files import find_videos

_NAMES = ("name", "video", "clip_id")
METHOD = re.compile(r"[\w .+-]+")


@dataclass(frozen=True)
class VideoSets:
    """Videos to evaluate.

    Attributes:
        methods: each method's files by name (the file's, without suffix), methods in the table's order.
        originals: files by name that methods are compared with; empty when there are none.
        prompts: by name, for those that have one.
    """

    methods: dict[str, dict[str, Path]]
    originals: dict[str, Path]
    prompts: dict[str, str]

    @property
    def names(self) -> list[str]:
        """Every name that a method or the originals have, sorted."""
        return sorted({name for files in self.methods.values() for name in files} | self.originals.keys())

    def missing(self) -> dict[str, list[str]]:
        """For each method the names that other methods have and it has not; methods that lack none are left out."""
        every = {name for files in self.methods.values() for name in files}
        lacking = {method: sorted(every - files.keys()) for method, files in self.methods.items()}
        return {method: names for method, names in lacking.items() if names}

    def without_original(self) -> list[str]:
        """Names that some method has and the originals have not; none when there are no originals at all."""
        every = {name for files in self.methods.values() for name in files}
        return sorted(every - self.originals.keys()) if self.originals else []


def find_video_sets(
    methods: Mapping[str, Path], originals: Path | None = None, prompts: Path | None = None
) -> VideoSets:
    """Find the files.

    Args:
        methods: folder of each method.
        originals: folder of what the methods should have made.
        prompts: CSV or JSONL with the columns `name` (or `video`, `clip_id`) and `prompt`; without it, a JSON file
            beside each video, of the same name, says its `prompt`. A video without one is no error.

    Raises:
        FileNotFoundError: a folder or file is missing, or a folder has no video.
        ValueError: no methods, a bad name of one, prompts that cannot be read, or no name in common with the originals.
    """
    if not methods:
        raise ValueError("videos: expected at least one method, as --videos NAME=DIR")
    for method in methods:
        if not METHOD.fullmatch(method):
            raise ValueError(
                f"videos: {method!r}: a method's name has letters, digits, '_', '-', '.' and '+'"
            )
    files = {method: _by_name(f"videos.{method}", folder) for method, folder in methods.items()}
    references = {} if originals is None else _by_name("reference", originals)
    if references and not any(references.keys() & found.keys() for found in files.values()):
        raise ValueError(
            f"reference: no video in {originals} has the name of a video of {', '.join(methods)}"
        )
    if prompts is not None:
        texts = read_prompts(prompts)
    else:
        everything = [path for found in [references, *files.values()] for path in found.values()]
        texts = _prompts_beside(everything)
    return VideoSets(files, references, texts)


def read_prompts(path: Path) -> dict[str, str]:
    """Prompts by video name from a CSV or JSONL file; names may have a suffix, which is dropped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, or columns missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"prompts: {path}: no such file")
    rows: Iterable[Any]
    try:
        if path.suffix.lower() == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as stream:
                rows = list(csv.DictReader(stream))
        elif path.suffix.lower() == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines if line.strip()]
        else:
            raise ValueError(f"prompts: {path}: expected a .csv or a .jsonl file")
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"prompts: {path}: cannot be read: {error}") from None
    prompts = {}
    for number, row in enumerate(rows, 1):
        key = next((key for key in _NAMES if isinstance(row, dict) and row.get(key)), None)
        if key is None or not isinstance(row.get("prompt"), str):
            raise ValueError(f"prompts: {path}: row {number}: expected the keys name and prompt, got {row}")
        name = str(row[key])
        prompts[Path(name).stem if Path(name).suffix.lower() in (".mp4", ".mkv", ".webm") else name] = row[
            "prompt"
        ]
    return prompts


def _by_name(key: str, folder: Path) -> dict[str, Path]:
    try:
        return {path.stem: path for path in find_videos(folder)}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _prompts_beside(paths: Iterable[Path]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in paths:
        beside = path.with_suffix(".json")
        if path.stem in found or not beside.is_file():
            continue
        try:
            content = json.loads(beside.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{beside}: not JSON ({error})") from None
        if isinstance(content, dict) and isinstance(content.get("prompt"), str):
            found[path.stem] = content["prompt"]
    return found
