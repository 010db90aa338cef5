"""`luve study build`, `luve study tally` and `luve judge`: videos compared by people, and by a multimodal judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from luve_lightning.cli import Verb
from luve_lightning.evaluation.tables import table_csv, table_markdown, table_rich
from luve_lightning.evaluation.video_sets import find_video_sets
from luve_lightning.files import write_text
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
from luve_lightning.terminal import Steps, say

VERBS = {
    "study build": Verb(
        "Measurement", "make a page on which people compare methods blind, and its key", named=("videos",)
    ),
    "study tally": Verb("Measurement", "count what people chose, with intervals; flag raters"),
    "judge": Verb("Measurement", "ask a multimodal judge about videos, or read its answers", named=("videos",)),
}

_AXES = list(AXES)
_SHOWN = ("raters", "axis", "method", "share", "low", "high")  # columns that fit a terminal of 80


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
    lines = [f"{output / PAGE}: {len(made.items)} items of {len(made.methods)} methods, {trials} groups per rater"]
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
    title = f"{len(found.raters)} of {len(known.plans)} raters, {len(known.items)} items"
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
        f"{output / judging.QUESTIONS}: {len(key.entries)} questions",
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
    console.print(table_rich(judging.MEAN_COLUMNS, means, f"{len(rows)} of {len(key.entries)} videos judged"))
    problems = [f"{path}: {problem}" for problem in found.problems]
    say(console, "\n".join([*problems, f"written to {output / 'table.csv'}, table.md and videos.csv"]))
