"""Opening an index for a verb: what is left out of it is said first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from luve_lightning.data.clip_hashes import ClipHashes
from luve_lightning.data.video_index import ClipEntry, Limits, Split, VideoIndex


def open_index(console: Console, csv: Path, clips: Path | None, keep: Limits) -> VideoIndex:
    """Open a CSV and print how many of its rows are clips, and why the others are not.

    Args:
        console: where to; a quiet one in all processes but the first.
        csv: with UltraVideo's columns.
        clips: folder of the clips; None looks beside the CSV.
        keep: which clips to take.
    """
    index = VideoIndex.from_csv(csv, clips, **vars(keep))
    console.print(index.summary(), soft_wrap=True, highlight=False, markup=False)
    return index


def check_folder(key: str, folder: Path) -> None:
    """Refuse a folder to write into that is a file, before anything is loaded.

    Raises:
        NotADirectoryError: it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{key}: {folder} is not a folder")


def entries_of(
    index: VideoIndex, splits: Sequence[Split] | None, limit: int | None = None
) -> list[ClipEntry]:
    """The clips of some splits, or of all of the index; at most `limit` of each.

    Raises:
        ValueError: there are none.
    """
    if splits is None:
        entries = index.entries[:limit]
    else:
        entries = [entry for split in splits for entry in index.split(split)[:limit]]
    if not entries:
        raise ValueError(f"{index.source}: no clips in {' and '.join(splits or ['it'])}")
    return entries


def uneven_line(hashes: ClipHashes, entries: Sequence[ClipEntry]) -> str:
    """What to say of clips with a variable frame rate, after their number; empty where there are none."""
    found = hashes.uneven([entry.path for entry in entries])
    return f"{len(found)} clips (first {found[0].stem}): frames are counted, not timed" if found else ""
