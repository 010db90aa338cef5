"""`luve judge`: questions about videos for a multimodal judge, and its answers as a table."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from luve_lightning.cli import Verb
from luve_lightning.evaluation.tables import table_csv, table_markdown, table_rich
from luve_lightning.evaluation.video_sets import find_video_sets
from luve_lightning.files import write_text
from luve_lightning.reporting.judge import (
    MEAN_COLUMNS,
    QUESTIONS,
    VIDEO_COLUMNS,
    QuestionOptions,
    mean_rows,
    read_answers,
    read_key,
    video_rows,
    write_questions,
)
from luve_lightning.terminal import Steps, say

VERBS = {
    "judge": Verb(
        "Measurement",
        "ask a multimodal judge about videos, or read its answers",
        named=("videos",),
    ),
}


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
        raise ValueError(
            "expected either --videos NAME=DIR, to ask, or --answers FILE, to read what was answered"
        )
    if videos is not None:
        folders = {name: folder for name, folder in videos.items() if folder is not None}
        _ask(console, output, folders, prompts, QuestionOptions(frames, max_side, embed, blind, seed))
    elif answers is not None:
        _read(console, output, answers, seed, replicates)


def _ask(
    console: Console, output: Path, folders: dict[str, Path], prompts: Path | None, options: QuestionOptions
) -> None:
    sets = find_video_sets(folders, None, prompts)
    with Steps(console) as steps:
        steps.begin("videos", sum(len(files) for files in sets.methods.values()))
        key = write_questions(sets, output, options, steps.advance)
    lines = [
        f"{output / QUESTIONS}: {len(key.entries)} questions",
        "next: luve judge --output ... --answers FILE",
    ]
    lines += [f"  not asked: {name}: {reason}" for name, reason in key.unreadable.items()]
    say(console, "\n".join(lines))


def _read(console: Console, output: Path, path: Path, seed: int, replicates: int) -> None:
    key = read_key(output)
    found = read_answers(path, key)
    rows = video_rows(found, key)
    means = mean_rows(rows, seed, replicates)
    write_text(output / "videos.csv", table_csv(VIDEO_COLUMNS, rows))
    write_text(output / "table.csv", table_csv(MEAN_COLUMNS, means))
    write_text(output / "table.md", table_markdown(MEAN_COLUMNS, means))
    console.print(table_rich(MEAN_COLUMNS, means, f"{len(rows)} of {len(key.entries)} videos judged"))
    lines = [f"{path}: {problem}" for problem in found.problems]
    lines.append(f"written to {output / 'table.csv'}, table.md and videos.csv")
    say(console, "\n".join(lines))
