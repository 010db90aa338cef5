"""Splits by source: the clips of one source video look alike, and on both sides of a split they would leak."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
FRACTIONS = (0.9, 0.05, 0.05)  # shares of the sources
NAMED = 5  # most urls named in a message


class VideoIndexError(ValueError):
    """An index or splits.json that cannot be used; the message is one line that says why."""


def hashed_split(url: str, fractions: tuple[float, float, float]) -> Split:
    """The split of a source video: the same on every machine, whatever other videos there are.

    SHA-256 of the url, as a number in [0, 1), falls into the share of train, val or test.

    Args:
        url: id of the source video.
        fractions: shares of train, val and test; they sum to 1.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions: expected three shares >= 0 that sum to 1, got {fractions}")
    place = _place(url)
    if place < fractions[0]:
        return "train"
    return "val" if place < fractions[0] + fractions[1] else "test"


def place_sources(
    sources: Iterable[str], fixed: Mapping[str, Split], fractions: tuple[float, float, float] = FRACTIONS
) -> dict[str, Split]:
    """The split of each source: the fixed one, else the hashed one, with at least one for training and validation.

    A small set's hashes may leave training or validation without a source. The one whose hash is nearest then moves
    there, from test first; a fixed source never does. With a single source there is no validation.

    Args:
        sources: ids of the sources.
        fixed: splits that are given.
        fractions: see `hashed_split`.
    """
    split_of = {source: fixed.get(source) or hashed_split(source, fractions) for source in dict.fromkeys(sources)}
    free = sorted((source for source in split_of if source not in fixed), key=_place)
    wanted: tuple[tuple[Split, tuple[Split, ...]], ...] = (("train", ("val", "test")), ("val", ("test", "train")))
    for split, others in wanted:
        counts = Counter(split_of.values())
        # Of train only what another one remains beside; of val and test any, as both may be made anew.
        movable = [s for s in free if split_of[s] in others and (split_of[s] != "train" or counts["train"] > 1)]
        if counts[split] or not movable:
            continue
        nearest = movable if split == "train" else movable[::-1]
        split_of[min(nearest, key=lambda source: others.index(split_of[source]))] = split
    return split_of


def _place(source: str) -> float:
    """A source's number in [0, 1): the lowest ones train."""
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") / 2**64


def read_splits(
    path: Path, used: Iterable[str], known: Iterable[str], what: str = "urls", whose: str = "the CSV"
) -> dict[str, Split] | None:
    """The split of each url in a `splits.json`, or None where there is no such file.

    Args:
        path: the file: {"train": [url, ...], "val": [...], "test": [...]}.
        used: urls that must be in it.
        known: urls that may be in it; others cause a warning, which names them.
        what: what urls are called, for messages.
        whose: where they come from, for messages.

    Raises:
        VideoIndexError: not such a file, a url that is listed twice, or one that is not listed.
    """
    if not os.path.lexists(path):
        return None
    if not path.is_file():  # otherwise the hash would decide, and clips of the test split would train
        raise VideoIndexError(f"{path}: {'a link to nothing' if path.is_symlink() else 'not a file'}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise VideoIndexError(f"{path}: not JSON ({error})") from None
    split_of: dict[str, Split] = {}
    for split, urls in _lists(path, content).items():
        for url in urls:
            if url in split_of:
                raise VideoIndexError(f"{path}: {url!r} is listed twice, in {split_of[url]} and in {split}")
            split_of[url] = split
    missing = sorted(set(used) - split_of.keys())
    if missing:
        raise VideoIndexError(f"{path}: {len(missing)} {what} of {whose} are not listed: {_some(missing)}")
    unknown = sorted(split_of.keys() - set(known))
    if unknown:
        warnings.warn(f"{path}: {len(unknown)} {what} are not in {whose}: {_some(unknown)}", stacklevel=2)
    return split_of


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object with unique keys; `json` keeps the last of equal ones."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return content


def _lists(path: Path, content: Any) -> dict[Split, list[str]]:
    if not isinstance(content, dict) or set(content) != set(SPLITS):
        keys = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise VideoIndexError(f"{path}: expected the keys {', '.join(SPLITS)}, got {keys}")
    for split, urls in content.items():
        if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
            raise VideoIndexError(f"{path}: {split}: expected a list of urls")
    return content


def _some(urls: list[str]) -> str:
    return ", ".join(urls[:NAMED]) + (f" and {len(urls) - NAMED} more" if len(urls) > NAMED else "")
