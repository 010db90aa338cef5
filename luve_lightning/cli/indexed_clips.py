"""What verbs that work through an index of clips share: opening it, checking what is stored, the summary."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console

from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.splits import Split
from luve_lightning.data.store import EntryCheck, K, TensorStore
from luve_lightning.data.video_index import ClipEntry, Limits, VideoIndex
from luve_lightning.terminal import Steps, amount, say


def open_index(console: Console, csv: Path, clips: Path | None, keep: Limits) -> VideoIndex:
    """Open an index and print how many of its rows are clips, and why the others are not.

    Args:
        console: a quiet one in all processes but the first.
        csv: UltraVideo's CSV, or the index that `luve index` wrote.
        clips: folder of the clips; None looks beside the index.
        keep: which clips to take.
    """
    index = VideoIndex.open(csv, clips, keep)
    say(console, index.summary(again=False))
    return index


def check_folder(key: str, folder: Path) -> None:
    """Refuse an output folder that is a file, before anything is loaded.

    Raises:
        NotADirectoryError: it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{key}: {folder} is not a folder")


def entries_of(index: VideoIndex, splits: Sequence[Split] | None, limit: int | None = None) -> list[ClipEntry]:
    """The clips of some splits, or of the whole index; at most `limit` of each.

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
    """The line about clips with a variable frame rate, after their number; empty where there are none."""
    found = hashes.uneven([entry.path for entry in entries])
    return f"{amount(len(found), 'clip')} (first {found[0].stem}): frames are counted, not timed" if found else ""


def print_summary(console: Console, where: Path | str, lines: Sequence[str], started: float) -> None:
    """Print the store or folder of a run, what it did, and the seconds since `started` (`time.perf_counter`).

    Empty lines are left out.
    """
    seconds = f"  seconds        {time.perf_counter() - started:.0f}"
    say(console, "\n".join([str(where), *filter(None, lines), seconds]))


def check_stored(
    console: Console, store: TensorStore[K], keys: Iterable[K], total: int, threads: int, started: float
) -> EntryCheck:
    """Read stored entries, about `total`, on some threads, and print how many are sound.

    Returns:
        The result; its `complain` ends the command with exit code 2 when some entries are damaged.
    """
    with Steps(console) as steps:
        steps.begin(store.entries, total)
        found = store.check_all(keys, threads, steps.advance)
    print_summary(console, store.root, [str(found)], started)
    return found
