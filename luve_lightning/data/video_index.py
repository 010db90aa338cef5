"""The index of clips, and their split by source video: clips of one video look alike and would leak otherwise."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from luve_lightning.data.video_rows import (
    CAPTIONS,
    COLUMNS,
    ClipEntry,
    Limits,
    VideoIndexError,
    read_rows,
)

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
NAMED = 5  # most urls named in a message


def hashed_split(url: str, fractions: tuple[float, float, float]) -> Split:
    """The split of a source video: the same on every machine, whatever other videos there are.

    SHA-256 of the url, as a number in [0, 1), falls into the share of train, val or test.

    Args:
        url: id of the source video.
        fractions: shares of train, val and test; they sum to 1.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions: expected three shares >= 0 that sum to 1, got {fractions}")
    place = int.from_bytes(hashlib.sha256(url.encode()).digest()[:8], "big") / 2**64
    if place < fractions[0]:
        return "train"
    return "val" if place < fractions[0] + fractions[1] else "test"


def read_splits(path: Path, used: Iterable[str], known: Iterable[str]) -> dict[str, Split] | None:
    """The split of each url in a `splits.json`, or None where there is no such file.

    Args:
        path: the file: {"train": [url, ...], "val": [...], "test": [...]}.
        used: urls that must be in it.
        known: urls that may be in it; others cause a warning, which names them.

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
        raise VideoIndexError(f"{path}: {len(missing)} urls of the CSV are not listed: {_some(missing)}")
    unknown = sorted(split_of.keys() - set(known))
    if unknown:
        warnings.warn(f"{path}: {len(unknown)} urls are not in the CSV: {_some(unknown)}", stacklevel=2)
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


__all__ = ["CAPTIONS", "COLUMNS", "SPLITS", "ClipEntry", "Limits", "Split", "VideoIndex", "VideoIndexError"]


class VideoIndex:
    """The usable clips of a CSV, and why the others are not.

    Args:
        entries: the clips, in the CSV's order.
        dropped: (clip_id, reason) of every row left out; a reason is "what: details".
        source: the CSV, for messages.
        splits: the split of each url, if given; None computes it from the url.
    """

    def __init__(
        self,
        entries: Sequence[ClipEntry],
        dropped: Sequence[tuple[str, str]] = (),
        source: Path | None = None,
        splits: Mapping[str, Split] | None = None,
    ) -> None:
        self.entries, self.dropped, self.source = list(entries), list(dropped), source
        self.splits = None if splits is None else dict(splits)

    @classmethod
    def from_csv(
        cls,
        csv: str | Path,
        folder: str | Path | None = None,
        *,
        min_frames: int = 1,
        min_height: int = 1,
        min_width: int = 1,
        fps_range: tuple[float, float] | None = None,
    ) -> VideoIndex:
        """Read and check a CSV with UltraVideo's columns.

        A `splits.json` beside it, {"train": [url, ...], "val": [...], "test": [...]}, fixes the split.

        Args:
            csv: the CSV. Columns may come in any order; more than UltraVideo's cause a warning.
            folder: folder of the clips; default `clips/` beside the CSV, else the CSV's folder.
            min_frames: take clips of at least this many frames.
            min_height: take clips at least this high, pixels.
            min_width: take clips at least this wide, pixels.
            fps_range: take clips with a frame rate within, both ends included; None takes all.

        Raises:
            FileNotFoundError: no such CSV or folder.
            VideoIndexError: not such a CSV, or no usable row.
        """
        path = Path(csv)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such CSV{_how_to_get(path)}")
        beside = path.parent / "clips"
        clips = Path(folder) if folder is not None else beside if beside.is_dir() else path.parent
        if not clips.is_dir():
            raise FileNotFoundError(f"{clips}: no such folder of clips")
        rows = read_rows(path, clips, Limits(min_frames, min_height, min_width, fps_range))
        used = {entry.url for entry in rows.entries}
        splits = read_splits(path.with_name("splits.json"), used, rows.urls)
        index = cls(rows.entries, rows.dropped, path, splits)
        if not index.entries:
            counts = ", ".join(f"{count} {what}" for what, count in index._counts()) or "it has no rows"
            raise VideoIndexError(f"{path}: no clip can be used: {counts} (folder {clips})")
        return index

    def __len__(self) -> int:
        return len(self.entries)

    def split(
        self, name: Split, fractions: tuple[float, float, float] = (0.9, 0.05, 0.05)
    ) -> list[ClipEntry]:
        """The clips of one split. All clips of a source video are in the same one.

        Args:
            name: "train", "val" or "test".
            fractions: shares of the source videos in this order; they sum to 1. Ignored where `splits.json` says
                which video is where.
        """
        if name not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {name!r}")
        urls = dict.fromkeys(entry.url for entry in self.entries)
        split_of = self.splits if self.splits is not None else {u: hashed_split(u, fractions) for u in urls}
        return [entry for entry in self.entries if split_of[entry.url] == name]

    def summary(self) -> str:
        """What the index holds and what was dropped, as lines of text."""
        urls = len({entry.url for entry in self.entries})
        kept = f"{len(self.entries)} clips of {urls} source videos"
        lines = [f"{self.source or 'index'}: {kept}, {len(self.dropped)} rows dropped"]
        for what, count in self._counts():
            clip_id, reason = next(pair for pair in self.dropped if _what(pair[1]) == what)
            details = reason.partition(": ")[2]
            lines.append(f"  {count:6d}  {what} (first: {' '.join(filter(None, (clip_id, details)))})")
        return "\n".join(lines)

    def _counts(self) -> list[tuple[str, int]]:
        return Counter(_what(reason) for _, reason in self.dropped).most_common()


def _how_to_get(path: Path) -> str:
    """The end of the message on a missing CSV: where it was looked for, and what makes the mini world's."""
    place = "" if path.is_absolute() else f" in {Path.cwd()}, to which the path is relative"
    made = path.parts[-3:] == ("mini", "world", path.name)
    return place + ("; `make mini-world` renders the mini world's, in the repository" if made else "")


def _what(reason: str) -> str:
    return reason.partition(": ")[0]
