"""`luve score`, `luve study` and `luve judge`: clips and videos rated by models, by people, and by a judge.

Imports neither Lightning nor diffusers: `luve score` also runs in HPS v3's environment, which lacks them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console

from luve_lightning.cli import Verb
from luve_lightning.cli.indexed_clips import entries_of, open_index, print_summary
from luve_lightning.data.clip_scores import FrameChoice, Shard, parse_shard, read_rows
from luve_lightning.data.quarantine import Quarantine
from luve_lightning.data.scorers import Scorer, ScoreTotals, score_clips
from luve_lightning.data.video_index import CAPTION, CAPTIONS, ClipEntry, Limits, Split
from luve_lightning.evaluation.tables import table_csv, table_markdown, table_rich
from luve_lightning.evaluation.video_sets import find_video_sets
from luve_lightning.files import write_text
from luve_lightning.machine import UnitTimes
from luve_lightning.reporting import judge as judging
from luve_lightning.reporting.study import AXES, PAGE, StudyOptions, build_study, read_key
from luve_lightning.reporting.study_answers import (
    RATER_COLUMNS,
    SHARE_COLUMNS,
    RaterQuality,
    how,
    rate_raters,
    rater_rows,
    read_answers,
    share_rows,
)
from luve_lightning.terminal import Steps, amount, say

VERBS = {
    "score": Verb(
        "Data", "score clips, for selecting training clips", examples=("experiments/score/mini.yaml",), goes_on=True
    ),
    "study build": Verb(
        "Measurement", "make a page on which people compare methods blind, and its key", named=("videos",)
    ),
    "study tally": Verb("Measurement", "count what people chose, with intervals; flag raters"),
    "judge": Verb("Measurement", "ask a multimodal judge about videos, or read its answers", named=("videos",)),
}

_AXES = list(AXES)
_SHOWN = ("raters", "axis", "method", "share", "low", "high")  # columns that fit a terminal of 80


def score(
    index: Path,
    output: Path,
    scorer: Scorer,
    caption: str = "Summarized Description",
    frames: int = 4,
    indices: list[int] | None = None,
    splits: list[Split] | None = None,
    clips: Path | None = None,
    keep: Limits = Limits(),  # noqa: B008  # frozen
    shard: str | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    max_bad_fraction: float = 0.05,
    measured: Path | None = None,
) -> None:
    """Scores several frames of each clip against its caption, into Parquet files.

    A clip that has its score is skipped, so an interrupted run continues. Unreadable clips are named with the
    reason, in the Parquet files, too. Under torchrun the processes share the clips.

    Args:
        index: UltraVideo's CSV, or an index that luve index made.
        output: Folder of the scores, one Parquet file per shard.
        scorer: Rates a frame, e.g. {class_path: luve_lightning.data.scorers.HPSv3Scorer}.
        caption: Column of the index that frames are scored against.
        frames: Frames per clip, equally spaced; the score is their mean.
        indices: Frame numbers, counted from 0, instead of equally spaced ones.
        splits: Splits to score, of train, val and test; default all clips.
        clips: Folder of the clips; default clips/ beside a CSV, else the index's own folder.
        keep: Which clips of the index to take.
        shard: This process's share of the clips: i/n, counted from 0. Default RANK/WORLD_SIZE as set by torchrun,
            else all clips.
        batch_size: Clips scored and written at once, the most that a kill can lose.
        num_workers: Threads that decode ahead; 0 decodes between the batches.
        max_bad_fraction: Share of clips that may be unreadable before the run stops; two always may, unless it is
            0.
        measured: Also write what it took to this file, FILE.json: seconds in all, of the first batch and of each later
            clip, and GPU memory. Under torchrun the first process's.
    """
    if batch_size < 1 or num_workers < 0:
        raise ValueError(f"expected batch_size >= 1 and num_workers >= 0, got {batch_size} and {num_workers}")
    if caption not in (*CAPTIONS, CAPTION):
        raise ValueError(
            f"caption: expected one of {', '.join(CAPTIONS)}, or {CAPTION} for clips of one's own, got {caption!r}"
        )
    choice = FrameChoice(frames, None if indices is None else tuple(indices))
    own = parse_shard(shard, os.environ)
    # Under torchrun the first process speaks for all.
    entries = entries_of(
        open_index(Console(emoji=False, quiet=os.environ.get("RANK", "0") != "0"), index, clips, keep), splits
    )
    _check_frames(scorer, choice, entries)
    bad = Quarantine(output / "unreadable.jsonl", max_bad_fraction, len(entries), [entry.path for entry in entries])
    console, started = Console(emoji=False), time.perf_counter()
    times = UnitTimes("clip")
    with Steps(Console(emoji=False, quiet=own.index > 0)) as steps:
        steps.begin("clips", len(entries[own.index :: own.count]))
        totals = score_clips(
            entries, scorer, output, caption, choice, own, batch_size, num_workers, bad, steps.advance, times
        )
    _report(console, output, own, scorer, totals, started)
    if own.index == 0:
        count = len(entries[:: own.count])
        times.write(
            measured, processes=own.count, units=count, total=count, there=totals.there, made=count - totals.there
        )


def _check_frames(scorer: Scorer, choice: FrameChoice, entries: Sequence[ClipEntry]) -> None:
    """Refuse frames that lie apart for a scorer that compares each with the next."""
    for entry in entries if scorer.of_clips else ():
        indices = choice.of(entry.total_frames)
        if any(after - before != 1 for before, after in pairwise(indices)):
            most = max(one.total_frames for one in entries)
            raise ValueError(
                f"{'frames' if choice.indices is None else 'indices'}: {scorer.name} rates frames that follow one "
                f"another, and {choice} of the {entry.total_frames} of {entry.clip_id} do not; expected "
                f"--frames {most}, all of the longest clip's, or --indices such as '[0, 1, 2, 3]'"
            )


def _report(console: Console, output: Path, shard: Shard, scorer: Scorer, totals: ScoreTotals, started: float) -> None:
    scores = [row.score for row in read_rows(output) if row.score is not None]
    spread = ""
    if scores:
        low, middle, high = np.quantile(scores, (0.1, 0.5, 0.9))
        spread = f"  of all {len(scores)}    10 % below {low:.4g}, half below {middle:.4g}, 90 % below {high:.4g}"
    lines = [
        f"  scored         {amount(totals.scored, 'clip')}",
        f"  already there  {totals.there}",
        f"  unreadable     {len(totals.unreadable)}",
        *(f"    {clip_id}: {reason}" for clip_id, reason in totals.unreadable),
        spread,
    ]
    print_summary(console, f"{output}, shard {shard}, by {scorer.name} ({scorer.version})", lines, started)


def study_build(
    videos: dict[str, Path | None],
    output: Path,
    key: Path | None = None,
    prompts: Path | None = None,
    raters: int = 20,
    repeats: float = 0.1,
    items: int | None = None,
    axes: list[str] = _AXES,
    title: str = "Which video is best?",
    seed: int = 0,
) -> None:
    """Builds a static page on which raters compare the methods' videos side by side, without their names.

    Give raters the folder (on any web server, or as a file) and each a link: index.html?rater=N. Positions and
    order are drawn for every rater. Answers stay in the rater's browser and are saved as a file, which you
    collect. The key says which video is which: keep it, and do not put it on the server.

    Args:
        videos: Folder of each method's videos, by name: --videos NAME=DIR, repeated. Matched by file name.
        output: Folder to give to raters; new, empty, or of the same study, which is then completed.
        key: JSON file of the key, outside that folder; default beside it, NAME-key.json.
        prompts: CSV or JSONL with the columns name and prompt; default a JSON file beside each video.
        raters: Number of raters, each with a number of their own.
        repeats: Share of the videos shown a second time, to check the raters' attention.
        items: Number of videos to show, drawn at random; default all. The paper shows 60.
        axes: Questions: some of overall, details, temporal and text.
        title: Title of the page.
        seed: Seed of everything that is drawn.
    """
    console = Console(emoji=False)
    folders = {name: folder for name, folder in videos.items() if folder is not None}
    options = StudyOptions(raters, repeats, items, tuple(axes), seed, title)
    sets = find_video_sets(folders, None, prompts)
    path = key if key is not None else output.parent / f"{output.name}-key.json"
    with Steps(console) as steps:
        built = build_study(sets, output, path, options, lambda total: steps.begin("videos", total), steps.advance)
    made = built.key
    trials = len(made.plans[0])
    shown = f"{amount(len(made.items), 'item')} of {amount(len(made.methods), 'method')}"
    lines = [f"{output / PAGE}: {shown}, {amount(trials, 'group')} per rater"]
    lines += [f"  left out: {name}: {reason}" for name, reason in built.left_out.items()]
    lines += [
        f"  videos written {built.written} of {len(made.items) * len(made.methods)}",
        f"  a rater's link: {PAGE}?rater=N, N from 1 to {raters}",
        f"  key: {path} (not for raters)",
        f"next: luve study tally --answers DIR --key {path} --output DIR",
    ]
    say(console, "\n".join(lines))


def study_tally(
    answers: Path, key: Path, output: Path, threshold: float = 0.5, seed: int = 0, replicates: int = 2000
) -> None:
    """Counts how often each method was chosen on each axis, with intervals, and flags inconsistent raters.

    Writes table.csv and table.md (shares of all raters and, when some are flagged, of the others alone) and
    raters.csv.

    Args:
        answers: Folder of the files that raters saved.
        key: Key of the study, from `luve study build`.
        output: Folder of the tables.
        threshold: Flag a rater who chooses the same method again at fewer of the repeated questions than this
            share. 0.5 is twice the chance level with four methods.
        seed: Seed of the bootstrap.
        replicates: Resamples of raters and items for the 95 % intervals.
    """
    console = Console(emoji=False)
    if replicates < 1 or seed < 0:
        raise ValueError(f"expected replicates >= 1 and seed >= 0, got {replicates} and {seed}")
    known = read_key(key)
    found = read_answers(answers, known)
    qualities = rate_raters(found, known, threshold)
    flagged = [quality for quality in qualities if quality.flagged]
    steady = [quality.answers for quality in qualities if not quality.flagged]
    rows = share_rows(found.raters, known, "all", seed, replicates)
    if flagged and steady:
        rows += share_rows(steady, known, "without flagged", seed, replicates)
    notes = [how(known), *found.notes, *_flag_notes(qualities, threshold)]
    people = rater_rows(qualities)
    write_text(output / "table.csv", table_csv(SHARE_COLUMNS, rows))
    write_text(output / "raters.csv", table_csv(RATER_COLUMNS, people))
    tables = [table_markdown(SHARE_COLUMNS, rows), table_markdown(RATER_COLUMNS, people)]
    parts = [*tables, *(f"- {n}\n" for n in notes[1:])]
    write_text(output / "table.md", f"# Study {known.study}\n\n{notes[0]}\n\n" + "\n".join(parts))
    title = f"{len(found.raters)} of {amount(len(known.plans), 'rater')}, {amount(len(known.items), 'item')}"
    shown = [{column: row[column] for column in _SHOWN} for row in rows]
    console.print(table_rich(_SHOWN, shown, title))
    say(console, "\n".join([*notes, f"written to {output / 'table.csv'}, table.md and raters.csv"]))


def _flag_notes(qualities: Sequence[RaterQuality], threshold: float) -> list[str]:
    flagged = [quality for quality in qualities if quality.flagged]
    unknown = [quality for quality in qualities if not quality.repeated]
    lines = [
        f"rater {quality.answers.rater} is flagged: the same choice at {quality.consistency:.0%} of "
        f"{quality.repeated} repeated questions, below {threshold:.0%}"
        for quality in flagged
    ]
    if flagged and len(flagged) == len(qualities):
        lines.append("every rater is flagged, so there are no shares without them")
    if unknown:
        numbers = ", ".join(str(quality.answers.rater) for quality in unknown)
        lines.append(f"no repeated question answered, so nothing is known of their attention: rater {numbers}")
    return lines


def judge(
    output: Path,
    videos: dict[str, Path | None] | None = None,
    prompts: Path | None = None,
    answers: Path | None = None,
    frames: int = 8,
    max_side: int | None = None,
    embed: bool = False,
    blind: bool = True,
    seed: int = 0,
    replicates: int = 1000,
) -> None:
    """Writes questions on realism, detail and alignment (1 to 10) for a multimodal judge, or reads its answers.

    First with --videos: writes questions.jsonl, the frames, and key.json, which says what each id stands for and
    must not reach the judge. Then with --answers: writes videos.csv and the means, table.csv and table.md. No
    model is called and nothing is sent anywhere.

    Args:
        output: Folder of the questions and of the results.
        videos: Folder of each method's videos, by name: --videos NAME=DIR, repeated.
        prompts: CSV or JSONL with the columns name and prompt; default a JSON file beside each video.
        answers: JSONL with id, realism, detail, alignment and optionally reason, one line per video.
        frames: Frames per video, equally spaced.
        max_side: Largest size of a frame's longer side, pixels; default unchanged.
        embed: Put the frames into questions.jsonl (base64) instead of files beside it.
        blind: Hide the methods' names behind random ids and shuffle the questions.
        seed: Seed of ids and order, and of the bootstrap.
        replicates: Resamples of the videos for the 95 % intervals.
    """
    console = Console(emoji=False)
    if (videos is None) == (answers is None):
        raise ValueError("expected either --videos NAME=DIR, to ask, or --answers FILE, to read what was answered")
    if videos is not None:
        folders = {name: folder for name, folder in videos.items() if folder is not None}
        _ask(console, output, folders, prompts, judging.QuestionOptions(frames, max_side, embed, blind, seed))
    elif answers is not None:
        _read_answers(console, output, answers, seed, replicates)


def _ask(
    console: Console, output: Path, folders: dict[str, Path], prompts: Path | None, options: judging.QuestionOptions
) -> None:
    sets = find_video_sets(folders, None, prompts)
    with Steps(console) as steps:
        steps.begin("videos", sum(len(files) for files in sets.methods.values()))
        key = judging.write_questions(sets, output, options, steps.advance)
    lines = [
        f"{output / judging.QUESTIONS}: {amount(len(key.entries), 'question')}",
        "next: luve judge --output ... --answers FILE",
    ]
    lines += [f"  not asked: {name}: {reason}" for name, reason in key.unreadable.items()]
    say(console, "\n".join(lines))


def _read_answers(console: Console, output: Path, path: Path, seed: int, replicates: int) -> None:
    key = judging.read_key(output)
    found = judging.read_answers(path, key)
    rows = judging.video_rows(found, key)
    means = judging.mean_rows(rows, seed, replicates)
    write_text(output / "videos.csv", table_csv(judging.VIDEO_COLUMNS, rows))
    write_text(output / "table.csv", table_csv(judging.MEAN_COLUMNS, means))
    write_text(output / "table.md", table_markdown(judging.MEAN_COLUMNS, means))
    console.print(table_rich(judging.MEAN_COLUMNS, means, f"{len(rows)} of {amount(len(key.entries), 'video')} judged"))
    problems = [f"{path}: {problem}" for problem in found.problems]
    say(console, "\n".join([*problems, f"written to {output / 'table.csv'}, table.md and videos.csv"]))
