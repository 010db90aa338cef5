"""The index of a folder of clips: UltraVideo's CSV, checked row by row, and its split by source video."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from luve_lightning.datasets.video_rows import (
    CAPTIONS,
    COLUMNS,
    ClipEntry,
    Limits,
    VideoIndexError,
    read_rows,
)
from luve_lightning.datasets.video_splits import SPLITS, Split, hashed_split, read_splits

__all__ = ["CAPTIONS", "COLUMNS", "SPLITS", "ClipEntry", "Limits", "Split", "VideoIndex", "VideoIndexError"]


class VideoIndex:
    """The clips of a CSV that can be used, and why the others cannot.

    Args:
        entries: the clips, in the CSV's order.
        dropped: (clip_id, reason) of every row left out; a reason is "what: details".
        source: the CSV, for messages.
        splits: the split of each url where it is given; None computes it from the url.
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
            folder: where the clips are; when left out, `clips/` beside the CSV, or else the CSV's folder.
            min_frames: take clips of at least this many frames.
            min_height: take clips at least this high, pixels.
            min_width: take clips at least this wide, pixels.
            fps_range: take clips with a frame rate within, both ends included; None takes all.

        Raises:
            FileNotFoundError: no such CSV or folder.
            VideoIndexError: not such a CSV, or no row of it can be used.
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
            fractions: shares of the source videos in this order; they sum to 1. Not used where `splits.json`
                says which video is where.
        """
        if name not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {name!r}")
        urls = dict.fromkeys(entry.url for entry in self.entries)
        split_of = self.splits if self.splits is not None else {u: hashed_split(u, fractions) for u in urls}
        return [entry for entry in self.entries if split_of[entry.url] == name]

    def summary(self) -> str:
        """What is in the index and what was dropped, as lines of text."""
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
    """Ends the message on a missing CSV: where it was looked for, and what makes the mini world's."""
    place = "" if path.is_absolute() else f" in {Path.cwd()}, to which the path is relative"
    made = path.parts[-3:] == ("mini", "world", path.name)
    return place + ("; `make mini-world` renders the mini world's, in the repository" if made else "")


def _what(reason: str) -> str:
    return reason.partition(": ")[0]
