"""`luve evaluate`: measures folders of videos, one a method, and compares them in a table; `luve ingest` fills some."""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torchmetrics import Metric

from luve_lightning.cli import Verb
from luve_lightning.cli.indexed_clips import check_folder, print_summary
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.video_files import check_name
from luve_lightning.evaluation.ingest import Ingested, VideoIngest, prompted_names
from luve_lightning.evaluation.prepared_metrics import Skipped, prepare_metrics
from luve_lightning.evaluation.report import (
    EvaluationReport,
    difference_rows,
    missing_lines,
    problem_lines,
    warnings,
    with_arrow,
    write_report,
)
from luve_lightning.evaluation.result_cache import ResultCache
from luve_lightning.evaluation.runner import Runner
from luve_lightning.evaluation.summary import Resampling, distances, summarise
from luve_lightning.evaluation.tables import format_value, table_rich
from luve_lightning.evaluation.video_sets import VideoSets, find_video_sets
from luve_lightning.files import write_text
from luve_lightning.machine import choose_device, decoding_threads
from luve_lightning.revision import revision_in_words
from luve_lightning.terminal import Steps, amount, say

VERBS = {
    "evaluate": Verb(
        "Measurement",
        "measure folders of videos, one per method, in one table",
        examples=("experiments/evaluate/metrics.yaml", "experiments/evaluate/mini.yaml"),
        named=("videos",),
        goes_on=True,
    ),
    "ingest": Verb(
        "Measurement", "bring in other projects' videos with their prompts", named=("videos", "tables"), goes_on=True
    ),
}


_SHOWN = 10  # problems per kind on the terminal; the report has all


def evaluate(
    videos: dict[str, Path | None],
    metrics: dict[str, Metric | None],
    output: Path,
    reference: Path | None = None,
    prompts: Path | None = None,
    motion: Path | None = None,
    compare: str = "all",
    cache: Path | None = None,
    seed: int = 0,
    replicates: int = 1000,
    frechet_replicates: int = 200,
    num_workers: int | None = None,
    memory_gib: float = 4.0,
    device: str = "auto",
) -> None:
    """Measures folders of videos, one per method, and writes one table as CSV, Markdown, JSON and LaTeX.

    Every value has a 95 % interval, a bootstrap over videos. Results of single videos are kept, so an interrupted
    run continues, and another method or metric measures only what is new. Videos that cannot be read and metrics
    that cannot run here are named with the reason, in the report, too.

    Args:
        videos: Folder of each method's videos, by name: --videos NAME=DIR, repeated.
        metrics: Metrics by name; null disables one.
        output: CSV file of the table; the other formats go beside it.
        reference: Folder of the originals, matched by file name, for full-reference metrics and for Fréchet
            distances without a reference of their own.
        prompts: CSV or JSONL with the columns name and prompt; default a JSON file beside each video.
        motion: Folder of motion videos, matched by file name, for measures that compare a video with its first stage;
            default those that luve generate kept with keep_stages, or that luve upsample enlarged.
        compare: Pairs of methods to compare: "A,B" is A minus B; separate several with ";". "all" is every other
            method minus the first, "none" is none.
        cache: Folder of the results of single videos; default cache/ beside the table.
        seed: Seed of the bootstrap.
        replicates: Number of resamples for means.
        frechet_replicates: Number of resamples for Fréchet distances; each decomposes a matrix.
        num_workers: Threads that decode; default one per core, at most 8.
        memory_gib: Limit on decoded frames waiting in memory; a single larger video is decoded all the same.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
    """
    started = time.perf_counter()
    console = Console(emoji=False)
    resampling = Resampling(seed, replicates, frechet_replicates)
    threads = decoding_threads() if num_workers is None else num_workers
    if threads < 1 or memory_gib <= 0:
        raise ValueError(f"expected num_workers >= 1 and memory_gib > 0, got {threads} and {memory_gib:g}")
    if output.suffix != ".csv":
        raise ValueError(f"output: expected a file that ends in .csv, got {output}")
    target = choose_device(device)
    folders = {name: folder for name, folder in videos.items() if folder is not None}
    sets = find_video_sets(folders, reference, prompts, motion)
    pairs = parse_pairs(compare, list(folders))
    folder = cache if cache is not None else output.parent / "cache"
    hashes, results = ClipHashes(folder), ResultCache(folder)
    chosen = {name: metric for name, metric in metrics.items() if metric is not None}
    if not chosen:
        raise ValueError("metrics: expected at least one, by name")
    ready, skipped = prepare_metrics(
        chosen, target, bool(sets.originals), hashes.files, folder, bool(sets.prompts), any(sets.motions.values())
    )
    _announce(console, sets, skipped, target)
    with Steps(console) as steps:
        runner = Runner(sets, ready, skipped, results, hashes, target, threads, int(memory_gib * 2**30))
        found = runner.run(lambda total: steps.begin("videos", total), steps.advance)
        steps.begin("resamples", distances(found, list(folders), resampling))
        summary = summarise(found, results, list(folders), pairs, resampling, steps.advance)
    report = EvaluationReport(sets, found, summary, resampling, _facts(sets, folders, reference, target))
    if not any(report.videos(method) for method in folders):
        _tell_problems(console, report)
        raise ValueError(f"none of the videos of {', '.join(folders)} can be read")
    files = write_report(report, output)
    _tell(console, report, files, started)


def parse_pairs(text: str, methods: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of methods that an option requests.

    Args:
        text: "all", "none", or "A,B;C,D".
        methods: in the table's order.

    Raises:
        ValueError: another text, or an unknown method.
    """
    if text == "none":
        return []
    if text == "all":
        return [(method, methods[0]) for method in methods[1:]]
    pairs = []
    for part in text.split(";"):
        names = [name.strip() for name in part.split(",")]
        if len(names) != 2 or names[0] == names[1] or not set(names) <= set(methods):
            raise ValueError(f"compare: expected all, none or pairs such as A,B of {', '.join(methods)}, got {text!r}")
        pairs.append((names[0], names[1]))
    return pairs


def _announce(console: Console, sets: VideoSets, skipped: Sequence[Skipped], device: torch.device) -> None:
    counts = ", ".join(f"{method} {len(files)}" for method, files in sets.methods.items())
    originals = f"; {len(sets.originals)} originals" if sets.originals else ""
    say(console, f"videos: {counts}{originals}; on {device}")
    if skipped:  # the reason is given at the end and in the report
        names = ", ".join(metric.name for metric in skipped)
        say(console, f"cannot run here: {names}")


def _facts(
    sets: VideoSets, folders: Mapping[str, Path], reference: Path | None, device: torch.device
) -> dict[str, str]:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    with_prompt = sum(name in sets.prompts for name in sets.names)
    return {
        "videos": ", ".join(f"{method} {folder}" for method, folder in folders.items()),
        "reference": str(reference or "none"),
        "prompts": f"of {with_prompt} of {amount(len(sets.names), 'name')}",
        "device": name,
        "revision": revision_in_words(),
        "python": platform.python_version(),
        "command": shlex.join(["luve", *sys.argv[1:]]),
    }


def _tell(console: Console, report: EvaluationReport, files: Sequence[Path], started: float) -> None:
    methods = list(report.sets.methods)
    rows: list[dict[str, Any]] = [{"metric": "videos"} | {name: report.videos(name) for name in methods}]
    rows += [
        {"metric": with_arrow(m)} | {name: report.interval(m.name, name).value for name in methods}
        for m in report.metrics
    ]
    console.print()
    console.print(table_rich(["metric", *methods], rows))
    for line in warnings(report):
        console.print(line, highlight=False)
    if report.summary.differences:
        _, differences = difference_rows(report)
        sure = [row for row in differences if row["low"] > 0 or row["high"] < 0]
        console.print(f"\nDifferences whose 95 % interval leaves out 0: {len(sure)} of {len(differences)}")
        for row in sure:
            ends = f"[{format_value(row['low'])}, {format_value(row['high'])}]"
            text = f"  {row['metric']}: {row['first']} - {row['second']} = {format_value(row['difference'])} {ends}"
            say(console, text)
    _tell_problems(console, report, next((path.name for path in files if path.suffix == ".md"), ""))
    lines = [
        f"  decoded        {amount(report.found.decoded, 'video')}",
        f"  already there  {report.found.there}",
        f"  unreadable     {len(report.unreadable)}",
    ]
    print_summary(console, f"\n{', '.join(path.name for path in files)} in {files[0].parent}", lines, started)


def _tell_problems(console: Console, report: EvaluationReport, listed_in: str = "") -> None:
    where = f", listed in {listed_in}" if listed_in else ""
    skipped = [str(metric) for metric in report.found.skipped]
    for title, lines in (
        ("Not run", skipped),
        ("Unreadable", problem_lines(report.unreadable)),
        ("Not measured", problem_lines(report.unmeasured)),
        ("Missing", missing_lines(report.sets)),
    ):
        if len(lines) > _SHOWN + 1:
            lines = [*lines[:_SHOWN], f"... and {len(lines) - _SHOWN} more{where}"]
        if lines:
            say(console, "\n".join([f"\n{title}:", *(f"  {line}" for line in lines)]))


def ingest(
    videos: dict[str, Path | None],
    output: Path,
    prompts: Path | None = None,
    tables: dict[str, Path | None] | None = None,
    seed: int = 0,
    first: int | None = None,
    copy: bool = False,
) -> None:
    """Brings folders of other projects' videos, one per method, into the layout that luve evaluate reads.

    Each becomes OUTPUT/METHOD/NAME.mp4, linked and never encoded again, under the name that luve generate gives the
    prompt's video, so that methods are compared video by video; a JSON file beside it holds the prompt. What is there
    is left alone, nothing is overwritten, and the same command continues an interrupted one. Files without a prompt,
    and those that several prompts fit, are named, all of them in OUTPUT/ingest.json.

    Args:
        videos: Folder of each method's videos, by name: --videos NAME=DIR, repeated.
        output: Folder of the methods' folders.
        prompts: What the videos show: a folder that luve generate wrote, or a file of prompts as it takes. Files are
            matched by the prompt's words in their names, its place in the file, or a table.
        tables: Table of a method's files, by name: --tables NAME=FILE, a CSV or JSONL with the columns file and prompt.
        seed: Seed that luve generate had, which is part of its videos' names; only with a file of prompts or tables.
        first: Number of the first prompt, 0 or 1, for files named by numbers alone; default as the numbers show.
        copy: Copy the files instead of linking to them.
    """
    started, console = time.perf_counter(), Console(emoji=False)
    check_folder("output", output)
    folders = {name: folder for name, folder in videos.items() if folder is not None}
    listed = {name: table for name, table in (tables or {}).items() if table is not None}
    if not folders:
        raise ValueError("videos: expected at least one method, as --videos NAME=DIR")
    if odd := [name for name in listed if name not in folders]:
        raise ValueError(f"tables: {odd[0]} is none of the methods {', '.join(folders)}")
    if first not in (None, 0, 1):
        raise ValueError(f"first: expected 0 or 1, got {first}")
    for name, folder in folders.items():
        check_name(name, "videos:")
        if (output / name).resolve() == folder.resolve():
            raise ValueError(f"videos.{name}: {folder} is where they would be brought to; choose another --output")
        if prompts is None and name not in listed:
            raise ValueError(f"prompts: required, but not given: {name} has no table either (--tables {name}=FILE)")
    names = None if prompts is None else prompted_names(prompts, seed)
    numbered = prompts is not None and not prompts.is_dir()
    into = VideoIngest(output, names, copy=copy, numbered=numbered, first=first, seed=seed)
    done = {name: into.bring(name, folder, listed.get(name)) for name, folder in folders.items()}
    report = {name: asdict(one) for name, one in done.items()}
    write_text(output / "ingest.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    for name, one in done.items():
        say(console, "\n".join(_ingested_lines(name, one)))
    lines = [
        f"  brought in     {amount(sum(one.made for one in done.values()), 'video')}",
        f"  already there  {sum(one.there for one in done.values())}",
    ]
    print_summary(console, output, lines, started)
    if not any(one.made + one.there for one in done.values()):
        raise ValueError(f"none of the videos of {', '.join(folders)} could be brought in; see {output}/ingest.json")


def _ingested_lines(name: str, done: Ingested) -> list[str]:
    lines = [f"{name}: {done.made} brought in, {done.there} already there"]
    for what, found in (
        ("not matched", done.unmatched),
        ("ambiguous", done.ambiguous),
        ("unreadable", done.unreadable),
    ):
        if found:
            lines.append(f"  {what}: {len(found)}")
            lines += [f"    {file}: {reason}" for file, reason in found[:3]]
            lines += [f"    ... and {len(found) - 3} more"] if len(found) > 3 else []
    if done.missing:
        lines.append(f"  prompts without a video: {len(done.missing)} (first {done.missing[0]})")
    return lines
