"""`luve index`, and what verbs that work through an index share: opening it, checking what is stored, the summary."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from luve_lightning.cli import Verb
from luve_lightning.data.hashes import ClipHashes, FileHashes
from luve_lightning.data.index_file import IndexRow, make_rows, read_rows, write_index
from luve_lightning.data.index_probes import ProbeCache, find_probes
from luve_lightning.data.index_sources import find_files
from luve_lightning.data.splits import SPLITS, Split, VideoIndexError, read_splits
from luve_lightning.data.store import EntryCheck, K, TensorStore
from luve_lightning.data.video_index import CAPTION, ClipEntry, Limits, VideoIndex, is_parquet
from luve_lightning.machine import cores
from luve_lightning.terminal import Steps, say

VERBS = {
    "index": Verb(
        "Data", "make an index of clips and stills of your own, or show one", positional="sources...", goes_on=True
    )
}

_SHOWN = 6  # sizes, rates and the like in one line


def index(
    sources: list[Path] | None = None,
    output: Path | None = None,
    split_by: str | None = None,
    splits: Path | None = None,
    processes: int | None = None,
    show: Path | None = None,
) -> None:
    """Makes an index of clips and stills, which every other verb takes as its index, or shows one.

    Each file is looked into once. What was found is remembered beside the index, so that an interrupted run goes on,
    and a later one looks only into files that are new or have changed. Files that cannot be used are in the index,
    too, with the reason.

    Args:
        sources: Folders of clips and stills, with captions in .txt files beside them or in metadata.csv or
            metadata.jsonl; tables (.csv, .jsonl, .json, Parquet) with a column file_name, video, image or path, and
            text, caption or prompt; UltraVideo's CSV; single files.
        output: The index to write, a Parquet file.
        split_by: What is never divided between training, validation and test: each "file", each "folder", or the files
            with the same value in a column of the tables. Default the column source or url of tables that have it,
            else each file.
        splits: JSON file that says which sources train, validate and test: {"train": [name, ...], "val": [...],
            "test": [...]}. Default the column split of tables that have it, the splits of the index that is replaced,
            and a hash of the source's name.
        processes: Processes that look into files; default one per core.
        show: Only print what this index holds.
    """
    console, started = Console(emoji=False), time.perf_counter()
    if show is not None:
        if sources or output:
            raise ValueError("show: takes no sources and no output; it only reads an index")
        say(console, "\n".join([str(show), *index_lines(_rows_of(show))]))
        return
    if not sources or output is None:
        raise ValueError("expected sources and --output INDEX.parquet, or --show INDEX")
    if output.suffix != ".parquet":
        raise ValueError(f"output: expected a name that ends in .parquet, got {output}")
    if processes is not None and processes < 1:
        raise ValueError(f"processes: expected at least 1, got {processes}")
    if splits is not None and not splits.is_file():
        raise FileNotFoundError(f"splits: no such file: {splits}")
    before = _splits_before(output)
    place, column = output.parent.resolve() / output.name, None if split_by in (None, "file", "folder") else split_by
    files = find_files(sources, column, place)

    def fixed(names: Sequence[str]) -> Mapping[str, Split]:
        if splits is None:
            return {name: before[name] for name in names if name in before}
        return read_splits(splits, names, names, "sources", "these files") or {}

    with Steps(console) as steps:
        looked = known = 0

        def begin(count: int, remembered: int) -> None:
            nonlocal looked, known
            looked, known = count, remembered
            steps.begin("files", count)

        cache = ProbeCache(output.parent)
        paths = [file.path for file in files if not file.reason]
        found = find_probes(paths, cache, processes or cores(), begin, steps.advance)
        steps.begin("compared", len(files))
        by = None if split_by == column else split_by
        rows = make_rows(files, found, FileHashes(output.parent), by, fixed, steps.advance)
    write_index(output, rows)
    again = f", {known} as before" if known else ""
    print_summary(console, output, [f"  looked into    {looked} files{again}", *index_lines(rows)], started)
    if not any(row.entry for row in rows):
        raise VideoIndexError(f"{output}: holds no clip that can be used; the reasons are above")


def _splits_before(output: Path) -> dict[str, Split]:
    """The splits in the index that will be replaced, which its sources keep."""
    if not output.exists():
        return {}
    if not output.is_file() or not is_parquet(output):
        raise ValueError(f"output: {output} is there and is no index; it is left as it is")
    return {row.entry.url: row.split for row in read_rows(output) if row.entry is not None}


def _rows_of(path: Path) -> list[IndexRow]:
    """The rows of an index, of UltraVideo's CSV, too."""
    if not path.exists():
        raise FileNotFoundError(f"show: no such index: {path}")
    if path.is_file() and is_parquet(path):
        return read_rows(path)
    index = VideoIndex.open(path)
    split_of = {entry.clip_id: split for split in SPLITS for entry in index.split(split)}
    rows = [IndexRow(entry.path, entry, split_of[entry.clip_id]) for entry in index.entries]
    return rows + [IndexRow(path.parent / clip_id, reason=reason) for clip_id, reason in index.dropped]


def index_lines(rows: Sequence[IndexRow]) -> list[str]:
    """What an index holds, in lines of text."""
    entries = [row.entry for row in rows if row.entry is not None]
    clips, stills = [e for e in entries if not e.still], [e for e in entries if e.still]
    seconds = sum(e.duration or (e.total_frames / e.fps if e.fps else 0) for e in clips)
    uneven = sum(e.uneven for e in clips)
    lines = [f"  clips          {len(clips)}, {_time(seconds)}"] if clips else ["  clips          none"]
    lines += [f"  stills         {len(stills)}"] if stills else []
    lines += [f"  sizes          {_most(f'{e.width}x{e.height}' for e in entries)}"] if entries else []
    if clips:
        varying = f"; {uneven} of them varying" if uneven else ""
        rates = _most(f"{e.fps:.4g}" if e.fps else "not said" for e in clips)
        lines += [f"  frames/s       {rates}{varying}", f"  frames         {_spread([e.total_frames for e in clips])}"]
    lines += _caption_lines(rows) + _split_lines(rows)
    lines += _counted("worth knowing", [(row, row.note) for row in rows if row.note])
    return lines + _counted("left out", [(row, row.reason) for row in rows if row.entry is None])


def _caption_lines(rows: Sequence[IndexRow]) -> list[str]:
    texts = {row.path.name: row.entry.captions.get(CAPTION) for row in rows if row.entry is not None}
    if all(text is None for text in texts.values()):  # UltraVideo's CSV, with columns of its own
        return []
    lengths = [len(text) for text in texts.values() if text]
    without = [name for name, text in texts.items() if not text]
    lines = [f"  captions       {len(lengths)}" + (f", of {_spread(lengths)} characters" if lengths else "")]
    return lines + ([f"  no caption     {len(without)} (first: {without[0]})"] if without else [])


def _split_lines(rows: Sequence[IndexRow]) -> list[str]:
    of: dict[Split, list[str]] = {split: [] for split in SPLITS}
    for row in rows:
        if row.entry is not None:
            of[row.split].append(row.entry.url)
    lines = [
        f"  {split:<14} {len(urls)} of {len(set(urls))} source{'s' * (len(set(urls)) != 1)}"
        if urls
        else f"  {split:<14} none"
        for split, urls in of.items()
    ]
    if not of["val"] and of["train"]:
        only = len({url for urls in of.values() for url in urls}) == 1
        why = f"there is one source only, {of['train'][0]}" if only else "the splits given say so"
        lines[1] += f": {why}; training goes on without validation"
    return lines


def _counted(head: str, named: Sequence[tuple[IndexRow, str]]) -> list[str]:
    """How many rows there are of each kind, with the first's file and details."""
    kinds = Counter(text.partition(": ")[0] for _, text in named)
    lines = [f"  {head:<14} {len(named)}"] if named else []
    for kind, count in kinds.most_common():
        row, text = next((row, text) for row, text in named if text.partition(": ")[0] == kind)
        details = text.partition(": ")[2]
        first = details if row.path.name in details else ": ".join(filter(None, (row.path.name, details)))
        lines.append(f"    {count:6d}  {kind} (first: {first})")
    return lines


def _most(values: Iterable[str]) -> str:
    """The most frequent values with their number."""
    counts = Counter(values).most_common()
    more = f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
    return ", ".join(f"{count} of {value}" for value, count in counts[:_SHOWN]) + more


def _spread(numbers: Sequence[int]) -> str:
    """From the least to the most, and the middle one."""
    low, middle, high = min(numbers), sorted(numbers)[len(numbers) // 2], max(numbers)
    return str(low) if low == high else f"{low} to {high}, half of them {middle} or more"


def _time(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} hours"
        if seconds >= 3600
        else f"{seconds / 60:.1f} minutes"
        if seconds >= 60
        else f"{seconds:.1f} s"
    )


def open_index(console: Console, csv: Path, clips: Path | None, keep: Limits) -> VideoIndex:
    """Open an index and print how many of its rows are clips, and why the others are not.

    Args:
        console: a quiet one in all processes but the first.
        csv: UltraVideo's CSV, or the index that `luve index` wrote.
        clips: folder of the clips; None looks beside the index.
        keep: which clips to take.
    """
    index = VideoIndex.open(csv, clips, keep)
    say(console, index.summary())
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
    return f"{len(found)} clips (first {found[0].stem}): frames are counted, not timed" if found else ""


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
