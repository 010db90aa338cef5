"""`luve index`: an index of clips and stills of your own, and what is in one."""

from __future__ import annotations

import os
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from luve_lightning.cli import Verb
from luve_lightning.cli.index_probes import Probe, ProbeCache, ProbedFile, find_probes, stamp_of
from luve_lightning.cli.index_sources import SourceFile, find_files
from luve_lightning.cli.indexed_clips import print_summary
from luve_lightning.config_files import read_config
from luve_lightning.data.index_file import IndexRow, counted, index_lines, read_rows, write_index
from luve_lightning.data.splits import SPLITS, Split, VideoIndexError, place_sources, read_splits
from luve_lightning.data.stills import TRANSPARENT, matte_colour
from luve_lightning.data.video_index import CAPTION, ClipEntry, Limits, RowError, VideoIndex, is_parquet
from luve_lightning.files import check_writable, text_digest
from luve_lightning.machine import cores
from luve_lightning.terminal import Steps, amount, say

VERBS = {
    "index": Verb(
        "Data", "make an index of clips and stills of your own, or show one", positional="sources...", goes_on=True
    )
}

_SCENE = re.compile(r"[-_. ]*scene[-_. ]*\d+$", re.IGNORECASE)  # PySceneDetect's names: clips of one video
_NO_SIGNS = re.compile(r"[^A-Za-z0-9]+")
_SLUG, _HASH = 40, 12  # characters of a clip's id


def index(
    sources: list[Path] | None = None,
    output: Path | None = None,
    split_by: str | None = None,
    splits: Path | None = None,
    matte: str | None = None,
    processes: int | None = None,
    show: Path | None = None,
    used_by: Path | None = None,
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
        matte: Colour to lay the transparent parts of stills on, such as white, grey or "#20a0ff"; default leaves such
            stills out.
        processes: Processes that look into files; default one per core.
        show: Only print what this index holds.
        used_by: Also print what this configuration of luve precompute, or of a training on latents, would use of it.
    """
    console, started = Console(emoji=False), time.perf_counter()
    if show is not None:
        if sources or output:
            raise ValueError("show: takes no sources and no output; it only reads an index")
        rows = _rows_of(show)
        used = [] if used_by is None else _used_lines(rows, used_by)
        say(console, "\n".join([str(show), *index_lines(rows), *used]))
        return
    if used_by is not None:
        raise ValueError("used_by: expected --show INDEX beside it")
    if not sources or output is None:
        raise ValueError("expected sources and --output INDEX.parquet, or --show INDEX")
    _check(output, processes, matte, splits)
    before = _splits_before(output)
    check_writable(output)
    place, column = output.parent.resolve() / output.name, None if split_by in (None, "file", "folder") else split_by
    files = find_files(sources, column, place)
    if column is not None and not any(file.source for file in files):
        raise ValueError(f"split_by: expected file, folder or a column of the tables, which has values, got {column!r}")

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
        rows = make_rows(files, found, cache, None if split_by == column else split_by, fixed, steps.advance, matte)
    write_index(output, rows)
    again = f", {known} as before" if known else ""
    print_summary(console, output, [f"  looked into    {amount(looked, 'file')}{again}", *index_lines(rows)], started)
    if not any(row.entry for row in rows):
        raise VideoIndexError(f"{output}: holds no clip that can be used; the reasons are above")


def _check(output: Path, processes: int | None, matte: str | None, splits: Path | None) -> None:
    """Refuse what is wrong whatever the sources are."""
    if output.suffix != ".parquet":
        raise ValueError(f"output: expected a name that ends in .parquet, got {output}")
    if processes is not None and processes < 1:
        raise ValueError(f"processes: expected at least 1, got {processes}")
    if matte is not None:
        matte_colour(matte)
    if splits is not None and not splits.is_file():
        raise FileNotFoundError(f"splits: no such file: {splits}")


def _splits_before(output: Path) -> dict[str, Split]:
    """The splits in the index that will be replaced, which its sources keep."""
    if not output.exists():
        return {}
    if not output.is_file() or not is_parquet(output):
        raise ValueError(f"output: {output} is there and is no index; it is left as it is")
    try:
        return {row.entry.url: row.split for row in read_rows(output) if row.entry is not None}
    except VideoIndexError as error:
        raise VideoIndexError(f"output: {error}; delete it first: its splits, which are kept, will be others") from None


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


def _used_lines(rows: Sequence[IndexRow], file: Path) -> list[str]:
    """What a configuration would use of an index, in lines of text."""
    config = read_config(file, "used_by")
    data = config.get("data") or {}
    options: dict[str, Any] = {**config, **(data.get("init_args") or {})}
    if "size" not in options or "frames" not in options:
        raise ValueError(f"used_by: {file} has no size and frames, for precompute or as data.init_args")
    try:
        buckets, recipe, keep = _choice(options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"used_by: {file}: {error}") from None
    entries, left = [], list[tuple[IndexRow, str]]()
    for row in rows:
        if row.entry is not None:
            try:
                keep.check(row.entry)
                entries.append(row.entry)
            except RowError as error:
                left.append((row, str(error)))
    assigned, no_bucket = buckets.assign(entries, recipe)
    reasons = {error.path: error.reason for error in no_bucket}
    for bucket, clips in assigned.items():  # a single size is every clip's bucket
        for entry in clips:
            if entry.height < bucket.size[0] or entry.width < bucket.size[1]:
                reasons[entry.path] = f"{entry.height}x{entry.width} pixels, smaller than {bucket}"
        assigned[bucket] = [entry for entry in clips if entry.path not in reasons]
    left += [(row, f"fits no bucket: {reasons[row.path]}") for row in rows if row.path in reasons]
    split_of = {row.entry.clip_id: row.split for row in rows if row.entry is not None}
    used = [entry for clips in assigned.values() for entry in clips]
    by_split = Counter(split_of[entry.clip_id] for entry in used)
    splits = ", ".join(f"{by_split[split]} {split}" for split in SPLITS)
    lines = [f"  used by        {file}: {len(used)} of {len(used) + len(left)}: {splits}"]
    lines += [f"    {len(clips):6d}  in {bucket}" for bucket, clips in assigned.items() if clips]
    return lines + counted("not used", left)


def _choice(options: Mapping[str, Any]) -> tuple[Any, Any, Limits]:
    """The Buckets, the LatentRecipe and the limits of a configuration."""
    # Here: `luve score`, which needs this module, runs without Lightning and diffusers.
    from luve_lightning.data.latent_store import LatentRecipe
    from luve_lightning.datamodules.buckets import AreaSizes, Buckets
    from luve_lightning.models.backbones import load_backbone

    size, frames = options["size"], options["frames"]
    size = AreaSizes(**size) if isinstance(size, Mapping) else size
    buckets = Buckets.chosen(size, frames, lambda: load_backbone(options["backbone"]).size_rules().step)
    times = {name: options[name] for name in ("start", "windows", "stride", "fps") if name in options}
    first = next(iter(buckets))
    recipe = LatentRecipe(vae="0" * 64, size=first.size, scales=(), frames=first.frames, **times)
    keep = dict(options.get("keep") or {})
    if keep.get("fps_range"):
        keep["fps_range"] = tuple(keep["fps_range"])
    return buckets, recipe, Limits(**keep)


def make_rows(
    files: Sequence[SourceFile],
    found: Mapping[Path, ProbedFile],
    cache: ProbeCache,
    by: str | None = None,
    fixed: Callable[[Sequence[str]], Mapping[str, Split]] = lambda sources: {},
    advance: Callable[[int], None] = lambda count: None,
    matte: str | None = None,
) -> list[IndexRow]:
    """The rows of an index, in the order of the files: a clip's id, its source, its split, or why it is left out.

    Args:
        files: what the sources name.
        found: what the files hold, where they are not left out already.
        cache: hashes files of equal size, to find those of equal bytes.
        by: "file" or "folder" makes each file or folder a source of its own; None takes what tables say, else files.
        fixed: splits that are given, of these sources.
        advance: called with the number of files that were compared.
        matte: colour behind the transparent parts of stills; None leaves such stills out.

    Raises:
        VideoIndexError: a table puts one source into two splits.
    """
    reasons = {file.path: file.reason or _reason(found[file.path][0], matte) for file in files}
    usable = [file for file in files if not reasons[file.path]]
    reasons |= _duplicates([(file.path, found[file.path][1]) for file in usable], cache, advance)
    usable = [file for file in usable if not reasons[file.path]]
    sources = {file.path: _source(file, by) for file in usable}
    given = _given_splits(usable, sources)
    split_of = place_sources(sources.values(), {**given, **fixed(list(dict.fromkeys(sources.values())))})
    ids, taken = clip_ids(usable), {file.path for file in usable}
    rows = []
    for file in files:
        if file.path not in taken:
            rows.append(IndexRow(file.path, reason=reasons[file.path]))
            continue
        probe, source = found[file.path][0], sources[file.path]
        entry = ClipEntry(
            clip_id=ids[file.path],
            path=file.path,
            url=source,
            fps=probe.fps,
            total_frames=probe.frames,
            width=probe.width,
            height=probe.height,
            captions={CAPTION: "", **file.captions},
            still=probe.still,
            uneven=probe.uneven,
            duration=probe.duration,
            matte=matte if probe.transparent else None,
        )
        rows.append(IndexRow(file.path, entry, split_of[source], note=file.note))
    return rows


def _reason(probe: Probe, matte: str | None) -> str:
    return TRANSPARENT if probe.transparent and matte is None else probe.reason


def clip_ids(files: Iterable[SourceFile]) -> dict[Path, str]:
    """An id for each file, unique and a valid file name: some letters of its name, and a hash.

    The hash is of the path from the source's folder, so that an id stays when the folder is moved; of two that are
    equal in this, the second's takes the folder's name in, too, or its whole path.
    """
    ids: dict[Path, str] = {}
    used: set[str] = set()
    for file in files:
        letters = unicodedata.normalize("NFKD", file.path.stem).encode("ascii", "ignore").decode()
        slug = _NO_SIGNS.sub("-", letters)[:_SLUG].strip("-")
        names = (file.name, f"{file.root}/{file.name}", str(file.path))
        hashed = (text_digest(unicodedata.normalize("NFC", name))[:_HASH] for name in names)
        choices = [file.clip_id, *("-".join(filter(None, (slug, end))) for end in hashed)]
        ids[file.path] = next(choice for choice in choices if choice and choice not in used)
        used.add(ids[file.path])
    return ids


def _source(file: SourceFile, by: str | None) -> str:
    if file.source and by is None:
        return file.source
    folder, _, name = f"{file.root}/{file.name}".rpartition("/")
    if by == "folder":
        return folder
    return f"{folder}/{_SCENE.sub('', Path(name).stem) or name}"


def _given_splits(files: Iterable[SourceFile], sources: Mapping[Path, str]) -> dict[str, Split]:
    given: dict[str, Split] = {}
    for file in files:
        if file.split is not None and given.setdefault(sources[file.path], file.split) != file.split:
            raise VideoIndexError(
                f"{file.path}: split: its source {sources[file.path]!r} is in {given[sources[file.path]]} and in "
                f"{file.split}: clips of one source video would leak from one to the other"
            )
    return given


def _duplicates(
    files: Sequence[tuple[Path, os.stat_result | None]], cache: ProbeCache, advance: Callable[[int], None]
) -> dict[Path, str]:
    """Why files are left out that are another one's link or copy: on two sides of a split they would leak."""
    reasons, same = dict[Path, str](), dict[tuple[int, int], Path]()
    by_size: dict[int, list[tuple[Path, os.stat_result]]] = {}
    for path, facts in files:
        assert facts is not None  # only a file that cannot be opened has none
        first = same.setdefault((facts.st_dev, facts.st_ino), path)
        if first != path:
            reasons[path] = f"link to another file: {path.name} is {first}"
        else:
            by_size.setdefault(facts.st_size, []).append((path, facts))
    for alike in by_size.values():
        known: dict[str, Path] = {}
        for path, facts in alike if len(alike) > 1 else ():
            with suppress(OSError):  # whoever reads it finds out
                first = known.setdefault(cache.digest(path, stamp_of(facts)), path)
                if first != path:
                    reasons[path] = f"copy of another file: {path.name} is equal to {first}"
        advance(len(alike))
    return reasons
